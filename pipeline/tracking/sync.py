"""Sending what waits in run folders: logged while the tracking server was away, or by a process that was killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import artifacts
from pipeline.errors import Busy
from pipeline.tracking.spool import SPOOL, Spool
from pipeline.tracking.stage_run import LEASE, Sender, describe_waiting, end
from pipeline.tracking.store import server_name


class Sync(NamedTuple):
    """What happened to the spool of a run folder. lost: entries that can never be sent."""

    folder: Path
    waiting: str  # what had to be sent, in words
    complete: bool = True  # False if the server does not answer
    lost: int = 0


def send_waiting(root: Path, runs: Path) -> Iterator[Sync]:
    """Send what waits in the folders `runs/<stage>/<run>`, up to the first failure.

    A folder that a stage is using is left to it. A run that was not ended, since its process died, ends as KILLED,
    at the time of its last entry. A spool that some server has as a whole is left alone."""
    server = server_name(root)
    for path in sorted(runs.glob(f"*/*/{SPOOL}")):
        try:
            with artifacts.lease(path.parent / LEASE):
                sync = _send(root, path.parent, server)
        except Busy:
            continue
        if sync is not None:
            yield sync
            if not sync.complete:
                return


def _send(root: Path, folder: Path, server: str) -> Sync | None:
    spool = Spool(folder, server)
    if spool.held and spool.ended:
        return None
    if not spool.ended:
        spool.append([end("KILLED", spool.path.stat().st_mtime)])
    waiting, sender = describe_waiting(spool), Sender(root, spool, server)
    complete = sender.send_all()
    return Sync(folder, waiting, complete, sender.lost)
