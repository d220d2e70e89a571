"""A snapshot is a model to use: averaged weights (safetensors) and how to build it (config.json).

To resume training one needs a checkpoint instead (training/checkpoint.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing, StorageError
from pipeline.models.config import CoreConfig, ShellConfig, SnapshotConfig
from pipeline.models.denoiser import Denoiser, ShellDenoiser, build_core, build_shell, pyramid_levels
from pipeline.models.finite import require_finite
from pipeline.models.statistics import Statistics


class Snapshot(NamedTuple):
    """A loaded model. `early` is the same network with weights from early in training, a guide, if they were
    kept."""

    denoiser: Denoiser
    config: SnapshotConfig
    digest: str
    early: Denoiser | None = None

    @property
    def resolution(self) -> int:
        """px of the images it makes."""
        return self.denoiser.resolution

    @property
    def statistics(self) -> Statistics:
        """How pixels are standardised."""
        return self.config.statistics

    def to_pixels(self, samples: Tensor) -> Tensor:
        """Grey levels, uint8, of standardised samples [B,3,H,W], at the contrast of this model."""
        return self.statistics.to_uint8(self.config.contrast * samples)


def describe(
    denoiser: Denoiser, core: Mapping[str, Any], shells: Sequence[Mapping[str, Any]]
) -> tuple[CoreConfig, tuple[ShellConfig, ...]]:
    """How to build `denoiser`, given the keyword values of its networks."""
    built = pyramid_levels(denoiser)
    levels = [level for level in built if isinstance(level, ShellDenoiser)]
    above = (ShellConfig(level.high_band_variance, net) for level, net in zip(levels, shells, strict=True))
    return CoreConfig(built[0].resolution, core), tuple(above)


def build(config: SnapshotConfig) -> Denoiser:
    """Build a denoiser with fresh weights from a snapshot's config."""
    denoiser: Denoiser = build_core(config.core.resolution, config.text_dim, config.core.net)
    for shell in config.shells:
        denoiser = build_shell(denoiser, config.text_dim, shell.high_band_variance, shell.net)
    return denoiser


Weights = Mapping[str, Tensor]


def write_snapshot(
    folder: Path, denoiser: Denoiser, config: SnapshotConfig, early: Weights | None = None
) -> None:
    """Write model.safetensors and config.json, and early.safetensors if there are early weights (by the names of
    the denoiser's state), into an existing folder (the caller commits it).

    Raises StorageError where a weight is not finite."""
    _write_weights(denoiser.state_dict(), folder / "model.safetensors")
    if early is not None:
        _write_weights(early, folder / "early.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1, sort_keys=True) + "\n")


def _write_weights(weights: Weights, path: Path) -> None:
    whole = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
    require_finite(whole, str(path), "run it again: it continues from the last checkpoint")
    save_file({name: tensor.clone() for name, tensor in whole.items()}, path)


def save_snapshot(
    path: Path | str, denoiser: Denoiser, config: SnapshotConfig, early: Weights | None = None
) -> None:
    """Commit a snapshot folder (what `write_snapshot` writes, and manifest.json) at `path`."""
    with artifacts.commit_directory(path, {"kind": config.kind}) as folder:
        write_snapshot(folder, denoiser, config, early)


def load_snapshot(path: Path | str, device: str | torch.device = "cpu") -> Snapshot:
    """Load and verify a snapshot.

    Raises InputMissing where there is none, and StorageError where a file differs from its manifest, or cannot be
    used by this version."""
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise InputMissing("E-INP-024", str(path), "no model snapshot here", "train one with `dvc repro`")
    artifacts.verify_directory(folder)
    config = read_config(folder / "config.json")
    denoiser = _load(config, folder / "model.safetensors", device)
    kept = folder / "early.safetensors"
    early = _load(config, kept, device) if kept.is_file() else None
    return Snapshot(denoiser, config, artifacts.directory_digest(folder), early)


def at_resolution(snapshot: Snapshot, resolution: int) -> Snapshot:
    """The model that makes images of `resolution`: the snapshot itself, or a level inside of it.

    Raises ConfigError where it has no such level."""
    known = [level.resolution for level in pyramid_levels(snapshot.denoiser)]
    if resolution not in known:
        fix = f"choose one of: {', '.join(map(str, known))}"
        raise ConfigError("E-CFG-051", "resolution", f"this model makes no {resolution} px", fix)
    i = known.index(resolution)
    config = replace(snapshot.config, shells=snapshot.config.shells[:i])
    early = pyramid_levels(snapshot.early)[i] if snapshot.early is not None else None
    return Snapshot(pyramid_levels(snapshot.denoiser)[i], config, snapshot.digest, early)


def read_config(path: Path) -> SnapshotConfig:
    """A snapshot's config.json, unverified. Raises StorageError where this version cannot use it."""
    try:
        return SnapshotConfig.from_json(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"this version cannot read it ({type(error).__name__}: {error})"
        fix = "retrain the model, or use the version that wrote it"
        raise StorageError("E-IO-022", str(path), problem, fix) from None


def _load(config: SnapshotConfig, path: Path, device: str | torch.device) -> Denoiser:
    """A denoiser with the weights of a file, for use alone."""
    denoiser = build(config)
    try:
        denoiser.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        where, problem = str(path.parent), " ".join(str(error).split())
        raise StorageError("E-IO-021", where, problem, "retrain: the weights fit another model") from None
    return denoiser.eval().requires_grad_(False).to(device)
