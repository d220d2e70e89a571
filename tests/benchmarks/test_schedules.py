"""Schedules and numbers of steps beside one another."""

from __future__ import annotations

from pathlib import Path

from benchmarks import schedules
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.features import randconv
from tests.benchmarks.tables import lines, tiny_pyramid
from tests.conftest import write_prepared


def test_schedules_are_compared_on_the_same_captions(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", count=192, resolution=32, low_resolution=16)
    dataset = PreparedDataset(tmp_path / "data")
    ways = [schedules.Way("geometric", 2, 1.0), schedules.Way("entropic", 5, 1.5)]
    text = schedules.schedule_table(tiny_pyramid(), dataset, [randconv(32)], ways, 60)
    assert text.startswith("60 images of ")
    few, more = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines(text)[2:]]
    assert few[:4] == ["geometric", "2", "none", "2"]
    assert more[:3] == ["entropic", "5", "1.5"] and int(more[3]) >= 5
    value, low, high = (float(part.strip("[],")) for part in few[4].split())
    assert low <= value <= high
