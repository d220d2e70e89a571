"""The state of every stage: what `dvc repro` would run again and why, and how far its runs have come.

What is stale is DVC's own answer (`dvc status`); which keys of params.yaml differ is read from dvc.lock, since DVC
names sections only. How far a run has come is read from its folder, `runs/<stage>/<fingerprint>/`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline import artifacts
from pipeline.config.strict_yaml import read_yaml
from pipeline.errors import STOPPED, Busy, ConfigError
from pipeline.launch.endings import Ending, last_ending
from pipeline.launch.fingerprint import entry_paths, read_stages, stage_identity
from pipeline.launch.history import MADE_FROM, leaves
from pipeline.tracking.stage_run import LEASE
from pipeline.training.records import FILM, Record, read_records

LOCK = "dvc.lock"
RECENT = 6  # records of progress that a rate is taken over
LOCK_SECONDS = 5.0  # that DVC may hold its lock; it is free while a stage runs
IN_USE = "another DVC command uses its files"
OUTS = {"deleted": "is missing", "modified": "was changed since", "not in cache": "is not in DVC's cache"}

State = Literal["fresh", "stale", "never run", "running", "stopped", "failed"]


@dataclass(frozen=True)
class Progress:
    """How far a run has come: training images seen and due, images per second, seconds left (None: unknown)."""

    nimg: int
    total: int
    rate: float | None
    left: float | None


@dataclass(frozen=True)
class StageState:
    """state: the most telling one that holds. why: what changed since the stage ran, or failed. folder: of the run
    that runs, stopped or failed. film: the film strip of that run or, where it has none yet, of the outputs."""

    name: str
    state: State
    why: tuple[str, ...] = ()
    progress: Progress | None = None
    folder: Path | None = None
    film: Path | None = None


def stage_states(root: Path, runs: Path) -> list[StageState]:
    """The stages of dvc.yaml, in order. Raises Busy while DVC holds its lock, ConfigError where DVC's files are
    damaged."""
    stages, changed = read_stages(root), dvc_changes(root)
    states: list[StageState] = []
    for name, section in stages.items():
        run = latest_run(runs / name)
        deps = set(entry_paths(section.get("deps", [])))
        before = [
            each.name
            for each in states
            if each.state != "fresh" and deps & set(entry_paths(stages[each.name].get("outs", [])))
        ]
        current = (
            run is not None and not before and _has_params(run, stage_identity(name, root, {})["params"])
        )
        state = _state(name, changed.get(name), before, run, current)
        states.append(replace(state, film=_film(root, state)))
    return states


def _film(root: Path, state: StageState) -> Path | None:
    folders = [*([] if state.folder is None else [state.folder]), root / "reports" / state.name]
    return next((folder / FILM for folder in folders if (folder / FILM).exists()), None)


def _state(
    name: str, changed: Sequence[str] | None, before: Sequence[str], run: Path | None, current: bool
) -> StageState:
    """changed: what differs from the last time it ran, empty if it never did, None if nothing does. before: stages
    whose outputs it reads, and which are not fresh. current: the same command would go on with `run`."""
    if run is not None and artifacts.is_held(run / LEASE):
        return StageState(name, "running", (), progress(run), run)
    if changed is None and not before:
        return StageState(name, "fresh")
    why = (*(changed or ()), *(f"follows {each}" for each in before))
    if run is not None and current and (ended := _ended(run)) is not None:
        state: State = "stopped" if ended.status == STOPPED else "failed"
        return StageState(name, state, (ended.line, *why), progress(run), run)
    return StageState(name, "never run" if changed == [] else "stale", why)


def _has_params(run: Path, params: Mapping[str, Any]) -> bool:
    """Whether a run was made from these parameters."""
    try:
        made_from = json.loads((run / MADE_FROM).read_text(encoding="utf-8"))
        return bool(made_from["params"] == json.loads(json.dumps(params)))
    except (ValueError, KeyError):  # damaged
        return False


def _ended(run: Path) -> Ending | None:
    """How a run ended that has no result; None if it has one, or never began."""
    if (run / "result").exists():
        return None
    reached = progress(run)
    killed = None if reached is None else Ending("was killed; the same command continues", STOPPED)
    return last_ending(run) or killed


def dvc_changes(root: Path) -> dict[str, list[str]]:
    """{stage that `dvc repro` would run: what changed}; nothing is named where it never ran."""
    locked = _locked(root)
    return {
        name: list(_words(entries, locked[name], root)) if name in locked else []
        for name, entries in _dvc_status(root).items()
    }


def _dvc_status(root: Path) -> dict[str, list[Any]]:
    """`dvc status` of each stage that is not fresh, as DVC has it: {stage: [{"changed deps": {path: how}}, ...]}.

    A stage whose files another DVC command is using has IN_USE instead."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)  # it tells of locks whose processes were killed
    try:
        with Repo(str(root)) as repo, _patiently(repo.lock):
            found: dict[str, list[Any]] = {}
            for stage in repo.index.stages:
                try:
                    found |= {} if stage.is_data_source else stage.status()
                except LockError:
                    found[stage.addressing] = [IN_USE]
            return found
    except DvcException as error:
        fix = "run `dvc status`, which says more"
        raise ConfigError("E-CFG-080", "dvc.yaml or dvc.lock", f"DVC cannot read it: {error}", fix) from error


@contextlib.contextmanager
def _patiently(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Hold DVC's lock, which other commands hold for moments, for the block."""
    from dvc.lock import LockError

    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock.__enter__()
            break
        except LockError as error:
            if time.monotonic() > end:
                fix = "wait until it ends, or stop it"
                raise Busy("E-BUSY-080", ".dvc/tmp/lock", "another DVC command holds it", fix) from error
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _locked(root: Path) -> dict[str, Any]:
    """Stages of dvc.lock."""
    path = root / LOCK
    try:
        stages: dict[str, Any] = read_yaml(path).get("stages") or {} if path.exists() else {}
    except ConfigError as error:
        fix = "run `git checkout dvc.lock`, or delete it: `dvc repro` writes it again from finished runs"
        raise ConfigError(error.code, error.where, error.problem, fix) from error
    return stages


def _words(entries: Sequence[Any], locked: Mapping[str, Any], root: Path) -> Iterator[str]:
    """What DVC found different, in words; parameters by key and value."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        for path, how in entry.get("changed deps", {}).items():
            if path == "params.yaml":
                yield from _params(locked.get("params", {}).get(path, {}), root)
            else:
                yield f"{path} {'is missing' if how == 'deleted' else 'changed'}"
        for path, how in entry.get("changed outs", {}).items():
            yield f"{path} {OUTS.get(how, how)}"


def _params(locked: Mapping[str, Any], root: Path) -> Iterator[str]:
    """`key old -> new` of the parameters of a stage that differ from params.yaml."""
    tree = read_yaml(root / "params.yaml")
    old = dict(leaves(locked))
    new = dict(leaves({name: _at(tree, name) for name in locked}))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield f"{key} {old.get(key)} -> {new.get(key)}"


def _at(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def latest_run(stage_runs: Path) -> Path | None:
    """The folder among `runs/<stage>/*` that was begun or continued last."""
    begun = stage_runs.glob(f"*/{MADE_FROM}")
    newest = max(begun, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def progress(run: Path, now: float | None = None) -> Progress | None:
    """Progress of a run, from its newest records; None if it has none yet."""
    records = [each for each in read_records(run / "progress.jsonl") if "total" in each]
    if not records:
        return None
    nimg, total = int(records[-1]["nimg"]), int(records[-1]["total"])
    rate = _rate(records[-RECENT:])
    if rate is None:
        return Progress(nimg, total, None, None)
    since = max((time.time() if now is None else now) - float(records[-1]["time"]), 0.0)
    return Progress(nimg, total, rate, max((total - nimg) / rate - since, 0.0))


def _rate(records: Sequence[Record]) -> float | None:
    """Images per second between the first and the last of some records."""
    if len(records) < 2:
        return None
    images = records[-1]["nimg"] - records[0]["nimg"]
    seconds = records[-1]["time"] - records[0]["time"]
    return images / seconds if images > 0 and seconds > 0 else None
