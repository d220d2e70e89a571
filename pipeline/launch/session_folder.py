"""The folder of one private Ray, for its logs and sockets, below /tmp or RAY_TMPDIR.

It is removed with its driver, or by the next driver if that was killed, and so are the processes that still use it:
two agents of Ray's wait a minute for the GCS server of a driver that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.processes import users_of

PREFIX = "crescendo-ray-"
LOCK = "lock"  # held by the driver


@contextlib.contextmanager
def session_folder() -> Iterator[Path]:
    """A new folder, removed at the end, with the processes that still use it; those of dead drivers are, too."""
    # Not TMPDIR, which may be long: the paths of Ray's sockets have 107 bytes at most.
    parent = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    if count := sweep(parent):
        print(f"removed what killed runs of Ray had left in {parent}: {PREFIX}* ({count})", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    with open(folder / f"{LOCK}.new", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, folder / LOCK)
        try:
            yield folder
        finally:
            _remove(folder)


def sweep(parent: Path) -> int:
    """Remove the folders of this user's drivers that are dead; their number."""
    left = [folder for folder in parent.glob(f"{PREFIX}*") if _is_left(folder)]
    for folder in left:
        _remove(folder)
    return len(left)


def _remove(folder: Path) -> None:
    """Kill the processes that use a folder, and remove it."""
    for pid in users_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # It is another user's, or being made or removed.
        if folder.stat().st_uid == os.getuid():
            with open(folder / LOCK, "rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
    return False
