"""Reading from a place that may be away for a while: a share, a disk, a store behind a network.

That a file could not be read says nothing about the file. It is tried again after short waits; what fails even then
is `Unread`, which no cache keeps. A source that fails many times in a row is not bad data: it is away.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from pipeline.errors import Busy, PipelineError, StorageError, reason
from pipeline.prepare.sources.files import Unread

WAITS = (0.2, 1.0, 3.0)  # seconds before each further attempt
MAX_WAIT = 60.0  # seconds that one reader waits in all
FEW = 5  # files in a row that may fail
_DENIED = {errno.EACCES, errno.EPERM}


def away(where: str, problem: str) -> Busy:
    """The error for a source that does not answer."""
    fix = "see that its disk, share or network is there, and run it again; what was done is kept"
    return Busy("E-BUSY-060", where, problem, fix)


class Patience:
    """Reads the files of one source, one after another."""

    def __init__(self) -> None:
        self._failed = 0
        self._left = MAX_WAIT

    def read(self, read: Callable[[], bytes], where: str) -> bytes:
        """The result of `read`, which reads the file `where`.

        Raises:
            BadData: what is wrong with the file; as `Unread`, that it could not be read.
            Busy: E-BUSY-060, more than FEW files in a row could not be read.
            AccessError, PermissionError: the file may not be read, now or later.
        """
        for wait in (*WAITS, None):
            try:
                content = read()
            except (Unread, OSError, StorageError, Busy) as exc:
                if isinstance(exc, OSError) and exc.errno in _DENIED:
                    raise
                if wait is None or wait > self._left:
                    self._give_up(exc, where)
                self._left -= wait or 0
                time.sleep(wait or 0)
            except Exception:
                self._failed = 0
                raise
            else:
                self._failed = 0
                return content
        raise AssertionError("the last attempt ends the loop")

    def _give_up(self, exc: Exception, where: str) -> None:
        self._failed += 1
        problem = exc if isinstance(exc, Unread) else _unread(exc, where)
        if self._failed > FEW:
            raise away(where, f"{problem.problem}, like {FEW} files before it") from None
        raise problem from None


def _unread(exc: Exception, where: str) -> Unread:
    why = exc.problem if isinstance(exc, PipelineError) else getattr(exc, "strerror", None) or reason(exc)
    return Unread(
        "E-IMG-012", where, f"cannot be read ({why})", "check its disk or network, and run it again"
    )
