"""Processes that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def signal_on_parent_death(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # It ended before the call.
        os.kill(os.getpid(), number)
