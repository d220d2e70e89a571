"""A model that is served: where it comes from, and its loaded weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.inference.generator import Generator, load_generator
from pipeline.models.counting import count_parameters
from pipeline.project import folder_name
from pipeline.registry.package import Registry, Version
from pipeline.registry.packaging import PROJECT
from pipeline.registry.provenance import films_of, read_films
from pipeline.serving.prompts import CachedEncoder
from pipeline.serving.sizes import offered_sizes, size_text

PREFIX = "crescendo."  # of tags
ELSEWHERE = (
    "model_digest",
    "default_passes",
    "verdict_rules",
)  # tags that the card has by other names, or is without


@dataclass(frozen=True)
class Served:
    """A loaded model; a version of the registry, or a folder (`version` None). films: PNG files, by stage."""

    name: str
    generator: Generator
    version: Version | None = None
    films: Mapping[str, bytes] = field(default_factory=dict)
    loaded: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @property
    def number(self) -> str | None:
        """Of the version."""
        return None if self.version is None else self.version.number

    @property
    def digest(self) -> str:
        """sha256 of the snapshot."""
        return self.generator.snapshot.digest

    @property
    def default_steps(self) -> int:
        """Passes of a refined model, sampler steps of others, where no number is asked for."""
        default, config = self.generator.default_passes, self.generator.snapshot.config
        return default or self.generator.passes() or config.sampling.num_steps

    @property
    def label(self) -> str:
        """For logs and messages: what this is."""
        version = "" if self.number is None else f" version {self.number}"
        return f"{self.name}{version} ({self.digest[:12]})"

    def card(self) -> dict[str, Any]:
        """What clients are told about it: JSON values."""
        config = self.generator.snapshot.config
        lineage = config.lineage.to_json() if self.version is None else _tags(self.version.tags)
        return {
            "id": self.name,
            "object": "model",
            "created": self.loaded,
            "owned_by": "crescendo",
            "version": self.number,
            "digest": self.digest,
            "kind": config.kind,
            "resolution": config.resolution,
            "sizes": [size_text(size) for size in offered_sizes(config)],
            "passes": list(config.passes),
            "default_steps": self.default_steps,
            "parameters": count_parameters(self.generator.snapshot.denoiser),
            "text_encoder": str(config.text_encoder["name"]),
            "upscales": bool(config.shells) and not (config.is_refined and config.upscale_steps is None),
            "films": list(self.films),
            "lineage": {name: value for name, value in sorted(lineage.items()) if value is not None},
        }


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that promotion has set, by their names without its prefix."""
    own = {name.removeprefix(PREFIX): value for name, value in tags.items() if name.startswith(PREFIX)}
    return {name: value for name, value in own.items() if name not in ELSEWHERE}


def load_version(registry: Registry, version: Version, device: str) -> Served:
    """Fetch, verify, load and warm a version. Raises StorageError where it does not verify, and where its first
    image fails."""
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        snapshot = registry.fetch(version, Path(folder))
        generator = load_generator(snapshot, device, version.default_passes, version.uri)
        films = read_films(snapshot.parent / PROJECT)
    return _warmed(Served(version.name, generator, version, films))


def load_folder(folder: Path, device: str, root: Path) -> Served:
    """Load, verify and warm the model in a folder. Raises as `load_version` does, or InputMissing."""
    folder = folder.resolve()
    films = films_of(folder.parent.parent, f"{folder.parent.name}/{folder.name}")
    content = {stage: film.read_bytes() for stage, film in films.items()}
    generator = load_generator(folder, device, address=folder_name(folder, root))
    return _warmed(Served(folder.name, generator, films=content))


def _warmed(served: Served) -> Served:
    encoder = CachedEncoder(served.generator.encoder)
    generator = replace(served.generator, encoder=encoder)
    try:
        generator.images([""], [0])
    except RuntimeError as error:
        problem = f"loads, but makes no image: {error}"
        raise StorageError("E-IO-070", served.label, problem, "promote another version") from error
    return replace(served, generator=generator)
