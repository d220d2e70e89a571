"""Signals that ask a training stage to stop: it ends with a checkpoint, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pipeline.training.records import STOP

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def stop_with_checkpoint(stage: str, run_dir: Path) -> Iterator[None]:
    """For the block, the first of SIGNALS asks the run in `run_dir` to stop (training/stop.py); the next one does
    what it did before. One that is ignored, as SIGHUP under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in replaced.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        (run_dir / STOP).touch()
        what = "stopping at the next record of progress, with a checkpoint; once more stops at once"
        # The terminal may be gone. Not print, which may be what the signal interrupts.
        with contextlib.suppress(OSError):
            os.write(2, f"{stage}: {what}\n".encode())

    for number in replaced:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
        (run_dir / STOP).unlink(missing_ok=True)
