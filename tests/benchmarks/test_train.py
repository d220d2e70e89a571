"""Tables of training updates at their smallest, with the peers that are installed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.train import settings, tables
from tests.benchmarks.tables import lines


@pytest.mark.parametrize("equal", ["parameters", "multiply-adds"])
def test_step_table_has_every_contender(equal) -> None:
    setting = settings.Setting(torch.device("cpu"), torch.float32, 16, 2, seconds=0.001, repeats=1)
    text = tables.step_table(settings.TINY, setting, equal, weigh=False)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == list(settings.CONTENDERS)


def test_update_table_has_every_contender() -> None:
    setting = settings.Setting(torch.device("cpu"), torch.float32, 16, 2, seconds=0.001, repeats=1)
    names = [line.split("|")[1].strip() for line in lines(tables.update_table(settings.TINY, setting))[2:]]
    assert names[0].startswith(settings.OURS)
    assert names[1:] == list(tables.UPDATES)
