"""Run folders: which of `runs/<stage>/<fingerprint>` nothing needs any more, and why others stay.

An unfinished run stays with all its checkpoints, as it can be continued. Of the others, those stay that something
needs (needs.py), whose records MLflow does not have yet, and the most recently used ones of each stage.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.housekeeping.items import Item, is_own, make_item, plain_folders
from pipeline.housekeeping.needs import Needs
from pipeline.launch.history import MADE_FROM, has_begun
from pipeline.tracking.spool import SPOOL, STATE
from pipeline.tracking.stage_run import LEASE

FINGERPRINT = re.compile(r"[0-9a-f]{16}")
DAY = 86400.0  # for which a run that has no checkpoint yet may still be starting somewhere
KIND = "runs"


def run_folders(runs: Path) -> Iterator[Path]:
    """All run folders, in order of stages; links are passed over."""
    for stage in plain_folders(runs):
        yield from (path for path in plain_folders(stage) if FINGERPRINT.fullmatch(path.name))


def unneeded_runs(runs: Path, needs: Needs, keep: int, stay: Counter[str]) -> Iterator[Item]:
    """Runs that may be removed; `stay` counts the others by reason. keep: how many of each stage stay anyway."""
    free: dict[str, list[Path]] = {}
    for run in run_folders(runs):
        reason = why_needed(run, needs)
        if reason is None:
            free.setdefault(run.parent.name, []).append(run)
        else:
            stay[reason] += 1
    for found in free.values():
        found.sort(key=lambda run: (run / MADE_FROM).stat().st_mtime, reverse=True)
        stay["among the newest"] += len(found[:keep])
        yield from (make_item(KIND, run, run / LEASE, aside=runs) for run in found[keep:])


def why_needed(run: Path, needs: Needs) -> str | None:
    """Why a run has to stay; None if it has not."""
    if not is_own(run):
        return "of another user"
    if artifacts.is_held(run / LEASE):
        return "in use"
    made_from = _made_from(run)
    if made_from is None:
        return "of unknown origin"
    if reason := needs.why(made_from):
        return reason
    if not is_finished(run) and (has_begun(run) or _touched(run) > time.time() - DAY):
        return "unfinished"
    if _model_digests(run) & needs.models:
        return "of a registered model"
    return "not yet sent to MLflow" if waits(run) else None


def is_finished(run: Path) -> bool:
    """Whether a run has a result that verifies."""
    try:
        artifacts.verify_directory(run / "result")
    except StorageError:
        return False
    return True


def waits(run: Path) -> bool:
    """Whether no server has all that was logged."""
    spool = run / SPOOL
    if not spool.is_file():
        return False
    try:
        states = json.loads((run / STATE).read_bytes())
        sent = max(int(each["sent"]) for each in states.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True
    return sent < spool.stat().st_size


def _made_from(run: Path) -> Mapping[str, Any] | None:
    """What a run says it was made from; None where that is missing, damaged, or of another version."""
    try:
        made_from: Mapping[str, Any] = json.loads((run / MADE_FROM).read_text(encoding="utf-8"))
        known = all(key in made_from for key in ("stage", "params", "deps", "format"))
    except (OSError, ValueError, TypeError):
        return None
    return made_from if known else None


def _touched(run: Path) -> float:
    """When something in a run was last written, in seconds since 1970."""
    return max(path.lstat().st_mtime for path in (run, *run.iterdir()))


def _model_digests(run: Path) -> set[str]:
    found = set()
    for manifest in run.glob(f"result/*/{artifacts.MANIFEST}"):
        try:
            found.add(artifacts.directory_digest(manifest.parent))
        except StorageError:
            continue
    return found
