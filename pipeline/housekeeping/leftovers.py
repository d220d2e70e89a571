"""What killed processes left: half-written files and folders, damaged checkpoints, Ray's scratch and sessions,
reproductions that were stopped."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import artifacts
from pipeline.housekeeping.items import Item, is_own, make_item, plain_folders
from pipeline.housekeeping.runs import DAY, run_folders
from pipeline.reproduce import workplace, worktree
from pipeline.tracking.stage_run import LEASE

TEMPORARY = re.compile(r"(?P<original>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-[0-9a-f]{8}")
SESSION = re.compile(r"session_[\d_-]+_(\d+)")
OUTPUTS = ("data", "models", "reports")
HALF, SCRATCH, BAD, SESSIONS, REPRODUCTIONS, RECORDS = (
    "half-written files",
    "scratch of Ray",
    "damaged checkpoints",
    "sessions of Ray",
    "reproductions that were stopped",
    "records of their work trees",
)


def leftovers(root: Path, runs: Path, shared: bool) -> Iterator[Item]:
    """What may be removed of a project. shared: other machines write to `runs`, so that what is new there may be
    theirs."""
    before = time.time() - (DAY if shared else 0.0)
    caches = [place for cache in plain_folders(runs / "prepare/cache") for place in plain_folders(cache)]
    tops = [*(root / name for name in OUTPUTS), runs]
    for place in [*tops, *(below for top in tops for below in plain_folders(top)), *caches]:
        yield from (make_item(HALF, path) for path in _half_written(place, before))
    for run in run_folders(runs):
        if is_own(run) and not artifacts.is_held(run / LEASE):
            yield from _of_run(run, before)


def _of_run(run: Path, before: float) -> Iterator[Item]:
    """Of one run, which no process of ours uses; a job of a cluster may, so what is new stays."""
    if (run / "job.json").exists():
        before = min(before, time.time() - DAY)
    below = [*plain_folders(run)]
    for place in [run, *below, *(inner for each in below for inner in plain_folders(each))]:
        yield from (make_item(HALF, path, run / LEASE) for path in _half_written(place, before))
        if place.name == "checkpoints":
            yield from (make_item(BAD, path, run / LEASE) for path in plain_folders(place, "quarantine")
                        if path.stat().st_mtime <= before)  # fmt: skip
    scratch = plain_folders(run, "ray")
    yield from (make_item(SCRATCH, path, run / LEASE) for path in scratch if path.stat().st_mtime <= before)


def _half_written(folder: Path, before: float) -> Iterator[Path]:
    """Copies that a dead process was writing to a folder, or had moved aside to replace."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match is None or artifacts.is_alive(int(match["pid"])) or not is_own(path):
            continue
        if path.lstat().st_mtime > before:
            continue
        if match["kind"] == "tmp" or path.with_name(match["original"]).exists():  # else it is the only copy
            yield path


def ray_sessions() -> Iterator[Item]:
    """Sessions of Ray on this machine, of this user, that no process belongs to and that are a day old."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    running = _command_lines()
    for path in plain_folders(folder, "session_*"):
        match = SESSION.fullmatch(path.name)
        if match is None or artifacts.is_alive(int(match[1])) or path.name in running:
            continue
        if all(map(_is_old, (path, *path.rglob("*")))):
            yield make_item(SESSIONS, path)


def reproductions(root: Path) -> Iterator[Item]:
    """Folders of this user's reproductions that nobody goes on with for a day, and what git in `root` knows of work
    trees in such folders, or in those that are gone."""
    old = []
    for folder in workplace.folders():
        touched = max(
            path.lstat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob("tree/runs/*/*/*"))
        )
        if touched < time.time() - DAY and not artifacts.is_held(folder / workplace.LEASE):
            old.append(folder)
            yield make_item(REPRODUCTIONS, folder, folder / workplace.LEASE)
    for record, tree in worktree.records(root):
        if tree.parent.name.startswith(workplace.PREFIX) and (tree.parent in old or not tree.exists()):
            yield make_item(RECORDS, record)


def _is_old(path: Path) -> bool:
    """Whether a file is this user's and was not written to for a day."""
    return is_own(path) and path.lstat().st_mtime < time.time() - DAY


def _command_lines() -> str:
    """Those of all processes that this user may see; Ray's name their session."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode("utf-8", "replace"))
        except OSError:  # it has ended
            continue
    return "\n".join(lines)
