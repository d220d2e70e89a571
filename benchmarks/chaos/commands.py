"""Commands of `crescendo` in this process, and what they answer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline import errors
from pipeline.cli import main
from pipeline.registry import journal
from pipeline.registry.journal import Journal
from pipeline.registry.package import Registry

NAME = "crescendo"
USAGE = 2  # argparse's status
LEASE = 0.3  # seconds, for those that wait for an entry which nobody will end


@dataclass(frozen=True)
class Answer:
    """The status of a command, and the lines that it wrote to stderr."""

    status: int
    lines: list[str]

    def problem(self, statuses: Collection[int]) -> str | None:
        """Why this is not an answer in one line with one of these statuses; None if it is."""
        said = [line for line in self.lines if not line.startswith(("note: ", "warning: "))]
        if self.status not in (*statuses, USAGE):
            return f"status {self.status}, not {sorted(statuses)}: {said[-1:]}"
        if self.status == USAGE:
            return None if said and ": error: " in said[-1] else f"usage without an error: {said}"
        if len(said) != 1 or not said[0].startswith("E-") or "Fix: " not in said[0]:
            return f"not one line: {said}"
        return None


def ask(words: Sequence[str]) -> Answer:
    """Run a command as `crescendo` does. What waits for a lease waits LEASE seconds."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch.object(journal, "LEASE", LEASE), mock.patch.object(journal, "POLL", LEASE / 5):
                errors.run_main(lambda: main.run(words))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Answer(status, err.getvalue().splitlines())


def registered(checkout: Path) -> Any:
    """What a registry holds: aliases, versions with their tags, and entries that are not open."""
    registry = Registry(checkout)
    versions = [(version.number, dict(version.tags)) for version in registry.versions(NAME)]
    entries = [entry.number for entry in Journal(registry, NAME).entries()]
    return registry.aliases(NAME), versions, entries
