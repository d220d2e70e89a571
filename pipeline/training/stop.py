"""Stopping a training run early, with a checkpoint: a file in the run folder asks for it.

Workers look for the file when a record of progress is due, and all stop there at once, so the records, and with
them the curves, are those of an unbroken run.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import Stopped
from pipeline.training.distributed import broadcast, rank_and_size
from pipeline.training.faults import Faults
from pipeline.training.records import STOP
from pipeline.training.schedule import due
from pipeline.training.state import TrainState


class Stops:
    """The last hook of a run; it raises Stopped on every worker alike."""

    def __init__(
        self,
        stage: str,
        run_dir: Path,
        interval: int,
        start: int,
        faults: Faults,
        save: Callable[[TrainState], None],
    ) -> None:
        self.stage, self.file, self.interval = stage, run_dir / STOP, interval
        self.start, self.faults, self.save = start, faults, save

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Stop if asked to, unless the state is not to be stored now."""
        if not due(state.nimg, self.interval, self.faults.batch_size) or not self.requested():
            return
        if self.faults.settled(state):
            self.save(state)
            where = f"stopped at image {self.start + state.nimg}, with a checkpoint"
            raise Stopped(
                "E-STOP-001", self.stage, where, "run the same command again to continue from there"
            )

    def requested(self) -> bool:
        """What the first worker sees."""
        seen = torch.tensor(float(rank_and_size()[0] == 0 and self.file.exists()))
        return bool(broadcast(seen.cuda() if torch.cuda.is_available() else seen))
