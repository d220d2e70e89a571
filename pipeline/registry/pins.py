"""Models that a stage takes from elsewhere: an address in params.yaml, and the digest of the snapshot there.

`finetune.init_from` is the model to grow, `evaluate.baseline` the one to compare with. DVC does not notice changes
of a registry or of a folder outside, so the digest is the dependency: `pin` and `pin_baseline` write it, and
`fetch` refuses any other snapshot.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline import artifacts
from pipeline.config.params import CORE_MODEL, Evaluate, Finetune
from pipeline.errors import ConfigError, InputMissing, StorageError
from pipeline.launch.stage import Stage
from pipeline.presets import change_params
from pipeline.registry import champions
from pipeline.registry.package import Registry, Version

TEACHER = "teacher"  # as a baseline: the fine-tuned model from which the judged one was refined


def pin(root: Path, address: str) -> list[str]:
    """Write `address` and the digest of its model into params.yaml, keeping comments; a line per changed value.

    An alias is replaced by the version it points to. Raises ConfigError, InputMissing or StorageError, and writes
    nothing, if there is no such model, its files are damaged, or params.yaml would not be valid.
    """
    fixed, digest = resolve(root, address)
    changes = {"finetune": {"init_from": fixed, "init_sha256": digest}}
    return change_params(root, changes, f"params.yaml with {address} pinned")


def pin_baseline(root: Path, address: str) -> list[str]:
    """As `pin`, for the model that `evaluate` compares with: a registered one; `teacher`, or nothing, unpins it."""
    if address in ("", TEACHER):
        fixed, digest, passes = "", "", 0
    elif address.startswith("models:"):
        version, digest, is_refined = _registered(Registry(root), address)
        fixed, passes = version.uri, (version.default_passes or 0) if is_refined else 0
    else:
        fix = f"write models:/NAME@champion, models:/NAME/3 or {TEACHER}"
        raise ConfigError(
            "E-CFG-056", "--baseline", f"{address!r} is not the address of a registered model", fix
        )
    changes = {
        "evaluate": {"baseline": fixed, "baseline_sha256": digest, "baseline_passes": passes},
    }
    return change_params(root, changes, f"params.yaml with the baseline {address} pinned")


def resolve(root: Path, address: str) -> tuple[str, str]:
    """(address without alias, digest of the verified snapshot); models/core, which DVC tracks, needs no digest."""
    if address.startswith("models:"):
        version, digest, _ = _registered(Registry(root), address)
        return version.uri, digest
    folder, project = (root / address).resolve(), root.resolve()
    fixed = folder.relative_to(project).as_posix() if folder.is_relative_to(project) else str(folder)
    return fixed, "" if fixed == CORE_MODEL else _verified(folder, address)


def _registered(registry: Registry, address: str) -> tuple[Version, str, bool]:
    """The version at an address, the digest of its verified snapshot, and whether this is a refined model."""
    from pipeline.models.snapshot import read_config

    version = champions.resolve(registry, address)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        snapshot = registry.fetch(version, Path(scratch))
        return version, _verified(snapshot, address), read_config(snapshot / "config.json").is_refined


def fetch(
    root: Path,
    address: str,
    digest: str,
    cache: Path,
    key: str = "finetune.init_sha256",
    command: str = "crescendo pin",
) -> Path:
    """The snapshot with this digest as a folder of `cache`: from an earlier call, else from `address`.

    Raises StorageError if another snapshot is at `address` now; it names the digest's `key` and the `command` that
    pins."""
    where = (key, address, f"{command} {address}")
    target = cache / digest
    if target.exists() and _verified(target, str(target)) == digest:
        return target
    if not address.startswith("models:"):
        _expect(digest, _verified(root / address, address), *where)
        artifacts.copy_into_place(root / address, target)
        return target
    registry = Registry(root)
    version = registry.resolve(address)
    _expect(digest, str(version.digest), *where)
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


def pinned_baseline(root: Path, section: Evaluate, cache: Path) -> Path | None:
    """Folder of the pinned baseline, below `cache`; None where the fine-tuned model is the baseline. Raises as
    `fetch` does."""
    if not section.baseline:
        return None
    key, command = "evaluate.baseline_sha256", "crescendo pin --baseline"
    return fetch(root, section.baseline, section.baseline_sha256, cache, key, command)


def _verified(folder: Path, address: str) -> str:
    """Digest of the snapshot in `folder`, whose files are verified."""
    if not all((folder / name).is_file() for name in (artifacts.MANIFEST, "model.safetensors")):
        fix = "name a folder that holds one, or models:/NAME/3"
        raise InputMissing("E-INP-042", address, "no model snapshot here", fix)
    return str(artifacts.verify_directory(folder)["digest"])


def _expect(expected: str, digest: str, key: str, address: str, command: str) -> None:
    if digest != expected:
        problem = f"holds snapshot {digest[:12]}, {key} expects {expected[:12]}"
        raise StorageError("E-IO-043", address, problem, f"run `{command}`, or restore that snapshot")
