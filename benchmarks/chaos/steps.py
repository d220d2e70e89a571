"""Dying at a step: every change of a file, every write to a database and every request to a server is one.

A process that counts its steps dies by SIGKILL right before one of them, which is right after the one before: what
lies between two steps leaves no trace.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

FILES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = ("INSERT", "UPDATE", "DELETE", "COMMIT")
QUIET = ("/dev/", "/proc/")


@dataclass
class Steps:
    """The steps of this process so far. fatal: the number of the one before which it dies; None: of none."""

    fatal: int | None = None
    names: list[str] = field(default_factory=list)

    def step(self, name: str) -> None:
        """Take a step, or die."""
        if self.fatal is not None and len(self.names) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook for `sys.addaudithook`."""
        path = str(arguments[0]) if arguments else ""
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR) and not path.startswith(QUIET):
                self.step(f"open {path}")
        elif event in FILES:
            self.step(f"{event} {path}")
        elif event == "http.client.send":
            self.step("request")


def watched(action: Callable[[], object], fatal: int | None = None) -> list[str]:
    """Do something and return the names of its steps; or die before step number `fatal`. Once a process: the hooks
    stay."""
    import http.client

    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    steps = Steps(fatal)
    answered = http.client.HTTPConnection.getresponse

    def answer(self: Any) -> Any:
        steps.step("answer")
        return answered(self)

    def statement(_: Any, __: Any, text: str, *___: Any) -> None:
        if text.lstrip().upper().startswith(WRITES):
            steps.step(text.split("(")[0][:60])

    event.listen(Engine, "before_cursor_execute", statement)
    event.listen(Engine, "commit", lambda _: steps.step("COMMIT"))
    sys.addaudithook(steps.audit)
    with mock.patch.object(http.client.HTTPConnection, "getresponse", answer):
        action()
    return steps.names
