"""Judging a model while it trains: each snapshot in a process of its own, aside.

A worker lays its averaged model out in `run_dir/watch` (`Snapshots` in pipeline/training/hooks.py). Here, in the
driver, a thread gives the newest one to the judge, a program that adds its numbers to scores.jsonl in that folder
and draws watch.png. Nothing that happens to a judge stops training: it is reported in one line.

Ray Train's own validation (`ray.train.report(..., validation=...)`) is not used: it exists only under Ray, takes a
CPU of the cluster, and a run does not end before all its validations have.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import copy_into_place
from pipeline.errors import one_line
from pipeline.launch.watch import POLL_SECONDS, Tail
from pipeline.processes import cpu_count
from pipeline.tracking import stage_run

NICE = ("nice", "-n", "10")  # a tenth of a busy core: less would never end, more would slow training
LAST_SECONDS = (
    180.0  # that a finished stage waits for the judge of its last snapshot: some 10 s, unless others are busy
)
PICTURES = ("watch.png", "watch.csv")


@dataclass(frozen=True)
class Judge:
    """What judges snapshots, and how often: every `interval` training images, 0 = never. It is started as
    `python COMMAND... ROOT SNAPSHOT`, at low priority."""

    interval: int
    command: tuple[str, ...] = ("-m", "pipeline.watch.judge")


class Judging:
    """Has the snapshots of a run judged for the time of a block, one at a time; those that newer ones overtake are
    skipped. The numbers go to the tracker, once each, and the pictures there and to `runs/<stage>`."""

    def __init__(self, stage: str, root: Path, run_dir: Path, judge: Judge, run: stage_run.StageRun) -> None:
        self.stage, self.root, self.judge, self.run = stage, root, judge, run
        self.folder, self.progress = run_dir / "watch", run_dir / "progress.jsonl"
        self._scores = Tail(self.folder / "scores.jsonl")
        self._judged: set[int] = set()
        self._last = 0  # nimg of the newest snapshot seen
        self._failed = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._snapshot = Path()  # the one that the process judges
        self._stop, self._deadline = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._follow, name="judging", daemon=True)

    def __enter__(self) -> Judging:
        if self.judge.interval:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.judge.interval:
            return
        self._deadline = time.monotonic() + (0 if kind else LAST_SECONDS)
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._summarise()
            for snapshot in self._snapshots().values():
                shutil.rmtree(snapshot, ignore_errors=True)

    def _follow(self) -> None:
        done = False
        while not done:
            ending = self._stop.wait(POLL_SECONDS)
            try:
                idle = self._poll()
                done = ending and (idle or time.monotonic() > self._deadline)
            except Exception as error:  # noqa: BLE001 - training must go on
                self._fail(f"{type(error).__name__}: {error}")
                done = ending
            if ending and not done:
                self._wait_for_judge()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _wait_for_judge(self) -> None:
        """Until it ends, or for the time of a poll; the judge needs the core that a busy loop would take."""
        if self._process is None:
            time.sleep(POLL_SECONDS)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(POLL_SECONDS)

    def _poll(self) -> bool:
        """Do what is due; True if no snapshot is left."""
        if self._process is not None and self._process.poll() is None:
            return False
        if self._process is not None:
            self._settle(self._process.returncode)
        self._log_scores()
        snapshots = self._snapshots()
        self._last = max(self._last, *snapshots, 0)
        newest = max(snapshots.keys() - self._judged, default=None)
        for nimg, path in snapshots.items():
            if nimg != newest:
                shutil.rmtree(path, ignore_errors=True)  # The worker may be removing it as well.
        if newest is None:
            return True
        self._start(snapshots[newest])
        return False

    def _snapshots(self) -> dict[int, Path]:
        """Snapshots that wait, by nimg."""
        return {int(path.name[-12:]): path for path in self.folder.glob("nimg-????????????")}

    def _start(self, snapshot: Path) -> None:
        self._snapshot = snapshot
        # On the CPU: memory of a GPU belongs to training. More threads would only wait for busy cores.
        aside = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, cpu_count() // 2))}
        try:
            with open(self.folder / "judge.log", "wb") as log:
                self._process = subprocess.Popen(
                    [*NICE, sys.executable, *self.judge.command, str(self.root), str(snapshot)],
                    env={**os.environ, **aside},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:  # a full disk, or no `nice`: the next snapshot is another try
            shutil.rmtree(snapshot, ignore_errors=True)
            self._fail(f"{snapshot.name}: {error}")

    def _settle(self, status: int) -> None:
        """What follows the end of a judge."""
        self._process = None
        overtaken = not self._snapshot.exists()  # The worker keeps the newest only.
        shutil.rmtree(self._snapshot, ignore_errors=True)
        if status and overtaken:
            return
        if status:
            lines = (self.folder / "judge.log").read_text(errors="replace").splitlines()
            reason = lines[-1] if lines else f"ended with status {status}"
            self._fail(f"{self._snapshot.name}: {reason}")
            return
        for name in PICTURES:
            copy_into_place(self.folder / name, self.folder.parents[1] / name, alone=True)
            self.run.log_artifact(self.folder / name, "watch")

    def _log_scores(self) -> None:
        """Send new records to the tracker; also those of earlier processes, which it stores once."""
        records = self._scores.read()
        self._judged |= {int(record["nimg"]) for record in records}
        self.run.log_batch(records)

    def _fail(self, reason: str) -> None:
        self._failed += 1
        print(one_line(f"warning: {self.stage}: not judged: {reason}"), file=sys.stderr, flush=True)

    def _summarise(self) -> None:
        """Say how many of the snapshots that were due have been judged, in this process or before."""
        reached = [int(record["nimg"]) for record in Tail(self.progress).read()]
        due = max([self._last, *self._judged, *reached], default=0) // self.judge.interval
        if not due:
            return
        judged = min(len(self._judged), due)
        failed = min(self._failed, due - judged)
        missed = f" ({failed} failed, {due - judged - failed} overtaken or late)" if judged < due else ""
        seen = f"; see {self.folder.parents[1] / PICTURES[0]}" if judged else ""
        print(f"{self.stage}: {judged} of {due} snapshots judged{missed}{seen}", file=sys.stderr)
