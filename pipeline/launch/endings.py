"""How the last process of a run ended, where it did not succeed: a line for whoever looks later."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import artifacts
from pipeline.errors import describe, exit_status_of, one_line

ENDED = "ended.json"


class Ending(NamedTuple):
    """The line that a user saw, and the exit status."""

    line: str
    status: int


@contextlib.contextmanager
def recorded_ending(run_dir: Path) -> Iterator[None]:
    """Record the exception with which the block ends, if any, in `run_dir`; a success leaves no record."""
    (run_dir / ENDED).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        line = describe(error) or one_line(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            artifacts.write_atomic(run_dir / ENDED, json.dumps(Ending(line, exit_status_of(error))._asdict()))
        raise


def last_ending(run_dir: Path) -> Ending | None:
    """How the last process of a run failed or was stopped; None if it was not, was killed, or still runs."""
    try:
        record = json.loads((run_dir / ENDED).read_text(encoding="utf-8"))
        return Ending(str(record["line"]), int(record["status"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
