"""Progress: what a worker appends to progress.jsonl, on the terminal and in the tracker."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.tracking import stage_run

POLL_SECONDS = 1.0
LINE_SECONDS = 15.0  # between progress lines where there is no terminal


class Tail:
    """Whole new records of a growing JSON-lines file, which may also be cut and replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = -1, 0
        self._seen: set[tuple[int, float]] = set()

    def read(self) -> list[dict[str, Any]]:
        """Records that were not returned before; none where there is no file yet."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._offset += len(whole) + 1
        records = [json.loads(line) for line in whole.split(b"\n")]
        fresh = [record for record in records if (record["nimg"], record["time"]) not in self._seen]
        self._seen.update((record["nimg"], record["time"]) for record in fresh)
        return fresh


def progress_line(stage: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """`pretrain 3,200/64,000 images, 85.3/s, loss 0.1234, 11:52 left`, from two records of one session."""
    parts = [f"{stage} {last['nimg']:,}/{last['total']:,} images"]
    elapsed, seen = last["time"] - first["time"], last["nimg"] - first["nimg"]
    speed = seen / elapsed if elapsed > 0 else 0.0
    if speed > 0:
        parts.append(f"{speed:.3g}/s")
    loss = next((name for name in last["metrics"] if "loss" in name), None)
    if loss:
        parts.append(f"{loss.replace('_loss', ' loss')} {last['metrics'][loss]:.4g}")
    if speed > 0:
        parts.append(f"{_clock((last['total'] - last['nimg']) / speed)} left")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressWatch:
    """A thread that follows a run folder while a worker trains: prints progress, feeds the tracker."""

    def __init__(self, stage: str, run_dir: Path, run: stage_run.StageRun, out: TextIO | None = None) -> None:
        self.stage, self.run_dir, self.run = stage, run_dir, run
        self.out = out or sys.stderr
        self._tail = Tail(run_dir / "progress.jsonl")
        self._pictures: set[Path] = set()
        self._first: dict[str, Any] | None = None
        self._line = self._shown = ""
        self._last_line = time.monotonic() - LINE_SECONDS
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> ProgressWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look(final=True)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._look()

    def _look(self, final: bool = False) -> None:
        records = self._tail.read()
        if records:
            self.run.log_batch(records)
        for picture in sorted(set((self.run_dir / "samples").glob("nimg-*.png")) - self._pictures):
            if not final and time.time() - picture.stat().st_mtime < POLL_SECONDS:
                continue  # It may still be being written.
            self._pictures.add(picture)
            self.run.log_image(picture, "samples", int(picture.stem.removeprefix("nimg-")))
        live = [r for r in records if "total" in r and r["metrics"] and r["time"] >= self._started]
        if live:
            self._first = self._first or live[0]
            self._line = progress_line(self.stage, self._first, live[-1])
        if self._line and (live or final):
            self._print(self._line, final)
        if final and self._first and self.out.isatty():
            print(file=self.out, flush=True)

    def _print(self, line: str, final: bool) -> None:
        if self.out.isatty():
            print(f"\r\x1b[2K{line}", end="", file=self.out, flush=True)
        elif final or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            if line != self._shown:
                print(line, file=self.out, flush=True)
            self._shown = line
