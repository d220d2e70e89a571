"""Everything about a project at one look, as a value, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.compute import load_profile
from pipeline.config.params import load_params
from pipeline.housekeeping.items import in_words
from pipeline.launch.stage import runs_folder
from pipeline.overview.disk import Disk, disk_of
from pipeline.overview.stages import Progress, StageState, stage_states
from pipeline.serving.announce import Running, running
from pipeline.tracking.store import store_exists

SHOWN = 5  # reasons in a row of text, and versions without an alias


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry. aliases: that point to it; verdict: `passed` or what else its evaluation said."""

    number: int
    aliases: tuple[str, ...]
    digest: str | None
    verdict: str | None


@dataclass(frozen=True)
class Overview:
    """name: of the registered model. versions: newest first; None if nothing was ever tracked here. services: of
    this project on this machine."""

    name: str
    stages: list[StageState]
    versions: list[RegisteredVersion] | None
    services: list[Running]
    disk: Disk


def look(root: Path) -> Overview:
    """The state of the project at `root`. Raises PipelineError where a file or the registry cannot be read."""
    runs = runs_folder(root, load_profile(root))
    name = load_params(root / "params.yaml").promotion.name
    stages, versions, services = stage_states(root, runs), _versions(root, name), list(running(runs))
    return Overview(name, stages, versions, services, disk_of(root, runs))


def _versions(root: Path, name: str) -> list[RegisteredVersion] | None:
    if not store_exists(root):
        return None
    from pipeline.registry.package import Registry

    registry = Registry(root)
    aliases = registry.aliases(name)
    versions = [
        RegisteredVersion(
            int(version.number),
            tuple(sorted(alias for alias, number in aliases.items() if number == version.number)),
            version.digest,
            version.tags.get("crescendo.verdict"),
        )
        for version in registry.versions(name)
    ]
    return sorted(versions, key=lambda version: version.number, reverse=True)


def as_json(overview: Overview) -> dict[str, Any]:
    """JSON values; folders as text."""
    tree = asdict(overview)
    tree["disk"] = overview.disk._asdict()
    for stage in tree["stages"]:
        stage |= {name: None if stage[name] is None else str(stage[name]) for name in ("folder", "film")}
    return tree


def lines(overview: Overview) -> Iterator[str]:
    """The overview as text, a line each."""
    yield "stages"
    for stage in overview.stages:
        yield f"  {stage.name:9} {stage.state:9}  {_detail(stage)}".rstrip()
    if overview.versions is None:
        yield "versions: nothing was tracked here yet"
    else:
        yield f"versions of {overview.name}" + (
            "" if overview.versions else ": none; see `crescendo promote`"
        )
        plain = [version for version in overview.versions if not version.aliases]
        for version in overview.versions:
            if version.aliases or version in plain[:SHOWN]:
                yield _version(version)
        if len(plain) > SHOWN:
            yield f"  and {len(plain) - SHOWN} older without an alias"
    for service in overview.services:
        yield f"service {service.url}: {_service(service)}"
    parts = [f"{name} {in_words(size)}" for name, size in overview.disk.used.items()]
    yield f"disk: {in_words(overview.disk.free)} free; {', '.join(parts) or 'nothing used'}"


def _detail(stage: StageState) -> str:
    """What there is to say of a stage beyond its state, and where its film strip lies."""
    shown = list(stage.why[:SHOWN])
    if len(stage.why) > SHOWN:
        shown.append(f"and {len(stage.why) - SHOWN} more")
    reached = [] if stage.progress is None else [_progress(stage.progress, stage.state == "running")]
    film = [] if stage.film is None else [_from_here(stage.film)]
    return "; ".join([*reached, *shown, *film])


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _progress(progress: Progress, running: bool) -> str:
    text = f"{progress.nimg:,} of {progress.total:,} images"
    if not running or progress.rate is None or progress.left is None:
        return text
    return f"{text}, {progress.rate:.3g} images/s, {tqdm.format_interval(progress.left)} left"


def _service(service: Running) -> str:
    if not service.answers:
        return "does not answer"
    what = "a folder" if service.version is None else f"version {service.version}"
    refused = f"; refuses {service.refused}" if service.refused else ""
    return f"serves {what} ({str(service.digest)[:12]}){refused}"


def _version(version: RegisteredVersion) -> str:
    aliases = ", ".join(version.aliases) or "-"
    digest = "by other software" if version.digest is None else version.digest[:12]
    return f"  {version.number:<3} {aliases:20} {digest}  {version.verdict or ''}".rstrip()
