"""Errors meant for users, and the one place that turns exceptions into exit statuses.

    PipelineError
    |- ConfigError    78  E-CFG-nnn   params.yaml, compute profile, command line
    |- InputMissing   66  E-INP-nnn   a file, folder or package is missing
    |- BadData        65  E-DAT-nnn   the data failed validation, or too much of it is unusable
    |- StorageError   74  E-IO-nnn    disk full, unreadable or changed bytes
    |- Busy           75  E-BUSY-nnn  a resource is held, or away for now; try again
    |- AccessError    77  E-ACC-nnn   no permission
    `- GateFailed      1  E-GATE-nnn  the model did not pass its evaluation; nothing is broken

Other statuses: 0 success, 70 a bug (with its traceback), 75 also for a run stopped by Ctrl-C or SIGTERM.
The numbers follow BSD's sysexits.h. Standard library only; every error survives pickling.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

OK = 0
BUG = 70
IO_ERROR = 74
STOPPED = 75
NO_PERMISSION = 77

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def one_line(text: object) -> str:
    """`text` on one line, with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def reason(exc: BaseException) -> str:
    """A short reason: the first line of `exc`, or its class."""
    return (str(exc).split("\n")[0] or type(exc).__name__)[:120]


class PipelineError(Exception):
    """An error that a user can fix: what is wrong, where, with which value, and what to do.

    Args:
        code: stable identifier, such as `E-CFG-001`.
        where: the file, key or object at fault.
        problem: what is wrong, with the value.
        fix: what to do about it.
    """

    exit_status = BUG

    def __init__(self, code: str, where: str, problem: str, fix: str) -> None:
        super().__init__(code, where, problem, fix)
        self.code = code
        self.where = where
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return one_line(f"{self.code} {self.where}: {self.problem}. Fix: {self.fix}")


class ConfigError(PipelineError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""

    exit_status = 78


class InputMissing(PipelineError):
    """A file, folder, package or model that a command needs is missing."""

    exit_status = 66


class BadData(PipelineError):
    """The data set failed validation, or too much of it is unusable."""

    exit_status = 65


class StorageError(PipelineError):
    """Bytes could not be written or read, or differ from what was written."""

    exit_status = IO_ERROR


class Busy(PipelineError):
    """Another process holds what this one needs, or it is away for now."""

    exit_status = STOPPED


class Stopped(PipelineError):
    """Somebody asked a run to stop, and it did, with a checkpoint."""

    exit_status = STOPPED


class AccessError(PipelineError):
    """The operating system or a server refused permission."""

    exit_status = NO_PERMISSION


class GateFailed(PipelineError):
    """The model did not pass the promotion gate. Status 1, as for a negative answer of `grep` or `test`."""

    exit_status = 1


def exit_status_of(exc: BaseException) -> int:
    """The process exit status for `exc` (see the module's table)."""
    if isinstance(exc, PipelineError):
        return exc.exit_status
    if isinstance(exc, OSError):
        return NO_PERMISSION if exc.errno in _DENIED else IO_ERROR
    if isinstance(exc, KeyboardInterrupt):
        return STOPPED
    return BUG


def describe(exc: BaseException) -> str | None:
    """The one line to show for `exc`, or None for a bug, whose traceback should be shown."""
    if isinstance(exc, PipelineError):
        return str(exc)
    if isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename else ""
        reason = exc.strerror or str(exc) or type(exc).__name__
        if exc.errno in _FULL:
            return one_line(f"E-IO-001 {where}disk full: {reason}. Fix: free some space and run it again")
        if exc.errno in _DENIED:
            return one_line(f"E-ACC-001 {where}{reason}. Fix: check owner, mode and mount of this path")
        return one_line(f"E-IO-002 {where}{reason}. Fix: check the path and its disk, then run it again")
    if isinstance(exc, KeyboardInterrupt):
        return "stopped; run the same command again to continue"
    return None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its status, or with the status of the exception it raised.

    SIGTERM and, unless it is ignored, SIGHUP are treated as Ctrl-C: the program unwinds and exits with 75. No file
    is made writable by everybody, whatever the umask.
    """
    os.umask(os.umask(0o022) | 0o002)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, _interrupt)
        status = main() or OK
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as in `crescendo preset | head`: nobody is left to report to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = OK
    except Exception as exc:  # noqa: BLE001 - the outermost frame of every program
        line = describe(exc)
        print(line, file=sys.stderr) if line else traceback.print_exc()
        status = exit_status_of(exc)
    except KeyboardInterrupt as exc:
        print(describe(exc), file=sys.stderr)
        status = STOPPED
    sys.exit(status)
