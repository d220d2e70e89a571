"""Which model the finetune stage grows: an address in params.yaml, and the digest of the snapshot at that address.

DVC does not notice changes of a registry or of a folder outside, so the digest is the dependency: `pin` writes it,
and `fetch` refuses any other snapshot.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline import artifacts
from pipeline.config.params import CORE_MODEL, Finetune
from pipeline.errors import InputMissing, StorageError
from pipeline.launch.stage import Stage
from pipeline.presets import change_params
from pipeline.registry.package import Registry


def pin(root: Path, address: str) -> list[str]:
    """Write `address` and the digest of its model into params.yaml, keeping comments; a line per changed value.

    An alias is replaced by the version it points to. Raises ConfigError, InputMissing or StorageError, and writes
    nothing, if there is no such model, its files are damaged, or params.yaml would not be valid.
    """
    fixed, digest = resolve(root, address)
    changes = {"finetune": {"init_from": fixed, "init_sha256": digest}}
    return change_params(root, changes, f"params.yaml with {address} pinned")


def resolve(root: Path, address: str) -> tuple[str, str]:
    """(address without alias, digest of the verified snapshot); models/core, which DVC tracks, needs no digest."""
    if address.startswith("models:"):
        registry = Registry(root)
        version = registry.resolve(address)
        with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
            digest = _verified(registry.fetch(version, Path(scratch)), address)
        return f"models:/{version.name}/{version.number}", digest
    folder, project = (root / address).resolve(), root.resolve()
    fixed = folder.relative_to(project).as_posix() if folder.is_relative_to(project) else str(folder)
    return fixed, "" if fixed == CORE_MODEL else _verified(folder, address)


def fetch(root: Path, address: str, digest: str, cache: Path) -> Path:
    """The snapshot with this digest as a folder of `cache`: from an earlier call, else from `address`.

    Raises StorageError if another snapshot is at `address` now."""
    target = cache / digest
    if target.exists() and _verified(target, str(target)) == digest:
        return target
    if not address.startswith("models:"):
        _expect(digest, _verified(root / address, address), address)
        artifacts.copy_into_place(root / address, target)
        return target
    registry = Registry(root)
    version = registry.resolve(address)
    _expect(digest, str(version.digest), address)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        artifacts.copy_into_place(registry.fetch(version, Path(scratch)), target)
    return target


def pinned(stage: Stage, section: Finetune) -> Path | None:
    """Folder of the pinned model, for the workers of a stage; None where models/core is grown, or the stage has
    finished before. Raises as `fetch` does."""
    if section.init_from == CORE_MODEL or stage.finished():
        return None
    cache = stage.run_dir.parents[1] / "init"
    return fetch(stage.root, section.init_from, section.init_sha256, cache)


def _verified(folder: Path, address: str) -> str:
    """Digest of the snapshot in `folder`, whose files are verified."""
    if not all((folder / name).is_file() for name in (artifacts.MANIFEST, "model.safetensors")):
        fix = "name a folder that holds one, or models:/NAME/3"
        raise InputMissing("E-INP-042", address, "no model snapshot here", fix)
    return str(artifacts.verify_directory(folder)["digest"])


def _expect(expected: str, digest: str, address: str) -> None:
    if digest != expected:
        problem = f"holds snapshot {digest[:12]}, finetune.init_sha256 expects {expected[:12]}"
        fix = f"run `crescendo pin {address}`, or restore that snapshot"
        raise StorageError("E-IO-043", address, problem, fix)
