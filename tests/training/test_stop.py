"""A run that is asked to stop writes a checkpoint at its next record of progress."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import Stopped
from pipeline.training import checkpoint
from pipeline.training.faults import Faults
from pipeline.training.state import Learner, TrainState
from pipeline.training.stop import Stops


def test_it_stops_when_a_record_is_due_but_not_within_a_row_of_skipped_steps(tmp_path: Path) -> None:
    state = TrainState({"net": Learner(nn.Linear(2, 2), (0.9, 0.99))})
    faults = Faults(tmp_path / "checkpoints", tmp_path, 4, 100, lambda nimg: [])
    stops = Stops("finetune", tmp_path, 8, 100, faults, partial(checkpoint.save, faults.checkpoints))
    sound, bad = ({"gradient_norm": torch.tensor(value)} for value in (1.0, math.nan))
    state.nimg = 8
    stops(state, sound)  # nobody asked
    (tmp_path / "stop").touch()
    state.nimg = 12
    stops(state, sound)  # no record is due
    state.nimg = 16
    faults(state, bad)
    stops(state, bad)
    assert checkpoint.newest(tmp_path / "checkpoints") == -1
    state.nimg = 24
    faults(state, sound)
    with pytest.raises(Stopped, match=r"E-STOP-001 finetune: stopped at image 124, with a checkpoint\."):
        stops(state, sound)
    assert checkpoint.newest(tmp_path / "checkpoints") == 24
