"""Hooks, called after every training step: checkpoints, snapshots, the progress file, anything at intervals.

Also the failure points at which tests kill a worker.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.training import checkpoint
from pipeline.training.distributed import rank_and_size
from pipeline.training.faults import Faults, Readback, skipped
from pipeline.training.records import notice, truncate
from pipeline.training.schedule import before_decay, due
from pipeline.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Training images between checkpoints, progress records, sample grids, and snapshots to judge (0: none)."""

    checkpoint_images: int
    log_images: int
    sample_images: int
    watch_images: int = 0


class Checkpoints:
    """Save a checkpoint every `interval` images of a run of `num_images`, but not within a row of skipped steps.

    `check_data` raises where the data have changed: then what was trained since the last checkpoint is not kept."""

    def __init__(
        self,
        folder: Path,
        interval: int,
        batch_size: int,
        num_images: int,
        faults: Faults,
        check_data: Callable[[], None],
        numerics: Mapping[str, str] = {},
    ) -> None:
        self.check_data = check_data
        self.folder, self.interval, self.batch_size, self.faults = folder, interval, batch_size, faults
        self.num_images, self.numerics = num_images, numerics

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Save when due."""
        if due(state.nimg, self.interval, self.batch_size) and self.faults.settled(state):
            self.save(state)
            self.faults.origin = {}

    def save(self, state: TrainState) -> None:
        """Save now."""
        self.check_data()
        checkpoint.save(self.folder, state, self.shared, self.numerics)

    def shared(self, nimg: int) -> bool:
        """Whether longer runs have the same checkpoint."""
        return due(nimg, self.interval, self.batch_size) and before_decay(
            nimg, self.batch_size, self.num_images
        )


class Snapshots:
    """Lays the averaged model out for whoever watches the run, as folders `nimg-<12 digits>/`, every `interval`
    images (0: never) of the clock that begins at `start`.

    The watcher removes what it has seen; without one, the newest KEEP stay. `gather()` gives the averages, on all
    workers together; `write(folder, averages)` writes the model and leaves the state as it was. Training does not
    depend on any of this, and goes on if the disk is full or a weight is not finite."""

    KEEP = 2

    def __init__(
        self,
        folder: Path,
        interval: int,
        batch_size: int,
        start: int,
        gather: Callable[[], list[Tensor]],
        write: Callable[[Path, list[Tensor]], None],
    ) -> None:
        self.folder, self.interval, self.batch_size = folder, interval, batch_size
        self.start, self.gather, self.write = start, gather, write

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Write when due."""
        nimg = self.start + state.nimg
        if not self.interval or not due(nimg, self.interval, self.batch_size):
            return
        averages = self.gather()
        if rank_and_size()[0]:
            return
        try:
            path = self.folder / f"nimg-{nimg:012d}"
            with artifacts.commit_directory(path, {"nimg": nimg}, forced=False) as folder:
                self.write(folder, averages)
        except (OSError, StorageError) as error:
            print(f"warning: no snapshot at image {nimg}: {error}", file=sys.stderr)
        for old in sorted(self.folder.glob("nimg-????????????"))[: -self.KEEP]:
            shutil.rmtree(old, ignore_errors=True)  # The watcher may be removing it as well.


class Progress:
    """Appends the means of the metrics, over steps that were not skipped, to progress.jsonl, one JSON line every
    `interval` images. Until then they stay on the device.

    The driver reads this file to show progress and to feed the tracker, so training never waits for a server. On a
    resume, lines beyond the checkpoint are dropped. `start`, the images trained in earlier rounds, is added to the
    clock; `total` is the number of images of the whole stage."""

    def __init__(
        self, path: Path, interval: int, batch_size: int, total: int, nimg: int, start: int = 0
    ) -> None:
        self.path, self.interval, self.batch_size, self.total = path, interval, batch_size, total
        self.start = start
        self.steps: list[Readback] = []
        if rank_and_size()[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate(path, nimg, start)

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Collect, and write when due."""
        if rank_and_size()[0]:
            return
        self.steps.append(Readback(metrics))
        if due(state.nimg, self.interval, self.batch_size):
            steps = [step.read() for step in self.steps]
            sound = [step for step in steps if not skipped(step)]
            count = {"skipped_steps": float(len(steps) - len(sound))} if len(sound) < len(steps) else {}
            self.write(state.nimg, means_of(sound) | count)
            self.steps = []

    def write(self, nimg: int, metrics: dict[str, float]) -> None:
        """Append one record; a no-op on other workers than the first."""
        if rank_and_size()[0]:
            return
        kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if kept.keys() != metrics.keys():
            lost = ", ".join(f"{name} {value}" for name, value in metrics.items() if name not in kept)
            notice(self.path.parent, self.start + nimg, f"at image {self.start + nimg} not recorded: {lost}")
        clock = {"nimg": self.start + nimg, "start": self.start, "total": self.total, "time": time.time()}
        with open(self.path, "a") as file:
            file.write(json.dumps({**clock, "metrics": kept}) + "\n")


def means_of(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric; nothing of no steps."""
    sums: dict[str, float] = {}
    for step in steps:
        for name, value in step.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: total / len(steps) for name, total in sums.items()}


class Every:
    """Call `action(state)` every `interval` images."""

    def __init__(self, interval: int, batch_size: int, action: Callable[[TrainState], None]) -> None:
        self.interval, self.batch_size, self.action = interval, batch_size, action

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Call the action when due."""
        if due(state.nimg, self.interval, self.batch_size):
            self.action(state)


def failpoint(name: str, nimg: int) -> None:
    """Kill this process (SIGKILL) if CRESCENDO_FAILPOINT is `name:nimg`, once.

    The file CRESCENDO_FAILPOINT_FILE, created just before, marks that it has happened. Only the last worker
    dies, so that a test also shows how the others are stopped."""
    if os.environ.get("CRESCENDO_FAILPOINT") != f"{name}:{nimg}":
        return
    rank, size = rank_and_size()
    if rank + 1 == size:
        try:
            with open(os.environ["CRESCENDO_FAILPOINT_FILE"], "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
