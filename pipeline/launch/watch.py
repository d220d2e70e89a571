"""Following a run folder: what a worker appends to progress.jsonl goes to the terminal and to the tracker."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from pipeline.progress import ProgressBar
from pipeline.tracking import stage_run
from pipeline.training.records import NOTICES, parse_lines, warn

POLL_SECONDS = 1.0


class Tail:
    """New complete records of a growing JSON-lines file, which may also be truncated and replaced.

    Damaged lines are counted on stderr."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = -1, 0
        self._seen: set[tuple[int, float]] = set()

    def read(self) -> list[dict[str, Any]]:
        """Records that were not returned before; none while there is no file."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            lines = file.read().rpartition(b"\n")[0]
        if not lines:
            return []
        self._offset += len(lines) + 1
        records, damaged = parse_lines(lines)
        if damaged:
            warn(f"{self.path}: {len(damaged)} damaged lines are left out")
        fresh = [record for record in records if (record["nimg"], record["time"]) not in self._seen]
        self._seen.update((record["nimg"], record["time"]) for record in fresh)
        return fresh


class ProgressWatch:
    """A thread that follows a run folder while a worker trains: shows progress and the notices of other processes
    (Ray keeps what its workers print), and feeds the tracker."""

    def __init__(self, stage: str, run_dir: Path, run: stage_run.StageRun, out: TextIO | None = None) -> None:
        self.run_dir, self.run = run_dir, run
        self._bar = ProgressBar(stage, out=out)
        self._tail = Tail(run_dir / "progress.jsonl")
        self._notices: dict[Path, Tail] = {}
        self._logged: set[Path] = set()
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> ProgressWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._poll(final=True)
        self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._poll()

    def _show_notices(self) -> None:
        for path in [*self.run_dir.glob(NOTICES), *self.run_dir.glob(f"*/{NOTICES}")]:
            for record in self._notices.setdefault(path, Tail(path)).read():
                if record.get("pid") != os.getpid() and record["time"] >= self._started:
                    warn(record.get("text", ""))

    def _poll(self, final: bool = False) -> None:
        self._show_notices()
        records = self._tail.read()
        if records:
            self.run.log_batch(records)
        for image in sorted(set((self.run_dir / "samples").glob("nimg-*.png")) - self._logged):
            if not final and time.time() - image.stat().st_mtime < POLL_SECONDS:
                continue  # It may still be being written.
            self._logged.add(image)
            self.run.log_image(image, "samples", int(image.stem.removeprefix("nimg-")))
        current = [r for r in records if "total" in r and r["metrics"] and r["time"] >= self._started]
        if current:
            last = current[-1]
            losses = {name: value for name, value in last["metrics"].items() if "loss" in name}
            self._bar(last["nimg"], last["total"], **losses)
