"""Processes: those that end with their parent, those that use a folder, memory. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import multiprocessing
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG = 1


def signal_on_parent_death(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # It ended before the call.
        os.kill(os.getpid(), number)


def end_with_creator() -> None:
    """End this process, even within C code, as soon as the one ends that started it by `multiprocessing`.

    A fork server between them, which is the parent, lives as long as any process that it has started.
    """
    creator = multiprocessing.parent_process()
    assert creator is not None
    pipe = creator.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())  # SIGIO, at the pipe's end, ends a process
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # It ended before.
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage in cycles a hundred times less often, while millions of small objects come and go that form
    none: the more there is in memory, the more each look costs."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def users_of(folder: Path) -> dict[int, str]:
    """{pid: name} of this user's other processes that have a file below `folder` open."""
    users, inside = {}, f"{folder}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has ended, or is another user's.
            opened = [os.readlink(file) for file in process.glob("fd/*")]
            if int(process.name) != os.getpid() and any(file.startswith(inside) for file in opened):
                users[int(process.name)] = (process / "comm").read_text().strip()
    return users
