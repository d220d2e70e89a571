"""The fingerprint of a stage: what DVC compares (dependencies and parameters) as one digest, without DVC or git."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from pipeline import artifacts
from pipeline.config.strict_yaml import Section, parse_section, read_yaml
from pipeline.errors import ConfigError, InputMissing

CHECKPOINT_FORMAT = 3  # A new number starts new runs, instead of failing to load old checkpoints.
INTERVALS = ("log_images", "sample_images", "watch_images")  # of what only looks at a run
CODE = ("pipeline", "stages")
IGNORED = ("__pycache__", "*.pyc", "*.tmp-*", "*.old-*")  # as .dvcignore has them


class _Stage(Section):
    """What is read of a stage in dvc.yaml; DVC checks the rest."""

    model_config = ConfigDict(extra="allow")

    deps: tuple[str | dict[str, Any], ...] = ()
    outs: tuple[str | dict[str, Any], ...] = ()
    params: tuple[str, ...] = ()


class _Pipeline(Section):
    model_config = ConfigDict(extra="allow")

    stages: dict[str, _Stage]


def read_stages(root: Path) -> dict[str, Any]:
    """The stages of dvc.yaml, with `${section.key}` replaced by the values of params.yaml."""
    tree, params = read_yaml(root / "dvc.yaml"), read_yaml(root / "params.yaml")

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\$\{([^}]+)\}", lambda match: str(_lookup(params, match[1])), value)
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            return {fill(key): fill(item) for key, item in value.items()}
        return value

    parse_section(_Pipeline, tree, "dvc.yaml")
    stages: dict[str, Any] = fill(tree["stages"])
    return stages


def _lookup(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            raise ConfigError("E-CFG-030", "dvc.yaml", f"params.yaml has no {dotted}", "correct the key")
        tree = tree[key]
    return tree


def digest_path(path: Path) -> str:
    """Digest of a file's bytes, of an artifact directory's verified manifest, or of the files of any other folder.

    Raises InputMissing if there is nothing at `path`, StorageError if an artifact does not verify.
    """
    if path.is_file():
        return artifacts.sha256_file(path)
    if (path / artifacts.MANIFEST).is_file():
        artifacts.verify_directory(path)
        return artifacts.directory_digest(path)
    if path.is_dir():
        return artifacts.digest(digest_files(path))
    raise InputMissing("E-INP-031", str(path), "is missing", "run `dvc repro`, which creates or fetches it")


def digest_files(folder: Path) -> dict[str, str]:
    """{relative path: digest} of the files below a folder."""
    files = (file for file in folder.rglob("*") if file.is_file() and not _ignored(file.relative_to(folder)))
    return {str(file.relative_to(folder)): artifacts.sha256_file(file) for file in files}


def _ignored(path: Path) -> bool:
    """Whether .dvcignore hides a file from DVC."""
    return any(fnmatch(part, pattern) for part in path.parts for pattern in IGNORED)


def is_code(path: str) -> bool:
    """Whether a dependency is code of the project rather than data."""
    return Path(path).parts[0] in CODE


def digest_url(url: str) -> str:
    """Digest of names, sizes and versions of the file at a URL, or of all below. Raises Busy where it is
    out of reach, AccessError where it refuses, InputMissing where there is no such store."""
    from pipeline.prepare.sources.places import open_place

    files = open_place(Path(), url).files()
    return artifacts.digest([[file.name, file.size, file.version] for file in files])


def entry_paths(entries: Sequence[Any]) -> list[str]:
    """Paths of `deps` or `outs`, each a path or {path: flags}."""
    return [next(iter(entry)) if isinstance(entry, Mapping) else str(entry) for entry in entries]


def dependencies(stage: str, root: Path, data: Path | None = None) -> dict[str, str]:
    """{path: digest} of all dependencies of `stage`: code below `root`, all else below `data` (default: `root`).

    Raises InputMissing for one that is not there."""
    names = entry_paths(stage_section(stage, root).get("deps", []))
    made = {path for each in read_stages(root).values() for path in entry_paths(each.get("outs", []))}
    places = {path: (root if is_code(path) else data or root) / path for path in names}
    for path in names:
        if "://" not in path and path not in made and not places[path].exists():
            fix = "put it there (`git checkout` or `dvc pull`, if they know it), or correct its path in params.yaml"
            raise InputMissing(
                "E-INP-032", path, f"is missing, which stage {stage} reads and none makes", fix
            )
    return {path: digest_url(path) if "://" in path else digest_path(places[path]) for path in names}


def outputs(stage: str, root: Path) -> list[str]:
    """Paths that `stage` writes."""
    return entry_paths(stage_section(stage, root).get("outs", []))


def stage_section(stage: str, root: Path) -> dict[str, Any]:
    """The entry of `stage` in dvc.yaml. Raises ConfigError where there is none."""
    stages = read_stages(root)
    if stage not in stages:
        problem = f"has no stage {stage}, but {', '.join(stages) or 'none at all'}"
        raise ConfigError("E-CFG-031", "dvc.yaml", problem, "add it (git log -p shows what it was)")
    section: dict[str, Any] = stages[stage]
    return section


def stage_params(stage: str, root: Path) -> dict[str, Any]:
    """{dotted key: value} of the parameters that `stage` depends on."""
    tree = read_yaml(root / "params.yaml")
    return {name: _lookup(tree, name) for name in stage_section(stage, root).get("params", [])}


def stage_identity(stage: str, root: Path, deps: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What makes a run of `stage`: what DVC compares (its dependencies and parameters), without how often something
    is logged or drawn, and the checkpoint format."""
    compared = dict(deps if deps is not None else dependencies(stage, root))
    params = {name: _without_intervals(value) for name, value in stage_params(stage, root).items()}
    return {"stage": stage, "deps": compared, "params": params, "format": CHECKPOINT_FORMAT}


def _without_intervals(value: Any) -> Any:
    """A section, or value, of params.yaml without INTERVALS."""
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if key not in INTERVALS}


def stage_fingerprint(stage: str, root: Path, deps: Mapping[str, str] | None = None) -> str:
    """Digest of `stage_identity`."""
    return artifacts.digest(stage_identity(stage, root, deps))


def code_files(root: Path, deps: Mapping[str, str]) -> dict[str, str]:
    """{path: digest} of the single files of code among dependencies."""
    files: dict[str, str] = {}
    for path in filter(is_code, deps):
        folder = root / path
        found = {"": deps[path]} if folder.is_file() else digest_files(folder)
        files |= {str(Path(path, name)): digest for name, digest in found.items()}
    return files
