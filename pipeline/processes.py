"""Processes that end with their parent."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import select
import signal

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
