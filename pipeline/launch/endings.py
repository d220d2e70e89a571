"""How the last process of a run ended, where it did not succeed, and how long all took: for whoever looks later."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import artifacts
from pipeline.errors import describe, exit_status_of, one_line

ENDED = "ended.json"
TIME = "seconds.json"


class Ending(NamedTuple):
    """The line that a user saw, and the exit status."""

    line: str
    status: int


@contextlib.contextmanager
def recorded_ending(run_dir: Path) -> Iterator[None]:
    """Record in `run_dir` the exception with which the block ends, if any, and the time that it took."""
    (run_dir / ENDED).unlink(missing_ok=True)
    began, before = time.monotonic(), seconds_taken(run_dir) or 0.0
    work = not (run_dir / "result").exists()
    try:
        yield
    except BaseException as error:
        line = describe(error) or one_line(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            artifacts.write_atomic(run_dir / ENDED, json.dumps(Ending(line, exit_status_of(error))._asdict()))
        raise
    finally:
        if work:
            with contextlib.suppress(OSError):
                artifacts.write_atomic(run_dir / TIME, json.dumps(before + time.monotonic() - began))


def seconds_taken(run_dir: Path) -> float | None:
    """Seconds for which processes have worked on a run; those that were killed do not count."""
    try:
        return float(json.loads((run_dir / TIME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def last_ending(run_dir: Path) -> Ending | None:
    """How the last process of a run failed or was stopped; None if it was not, was killed, or still runs."""
    try:
        record = json.loads((run_dir / ENDED).read_text(encoding="utf-8"))
        return Ending(str(record["line"]), int(record["status"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
