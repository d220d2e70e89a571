"""Samplers and guides beside one another."""

from __future__ import annotations

import numpy as np

from benchmarks import samplers
from pipeline.data.dataset import PreparedDataset
from tests.benchmarks.tables import lines, tiny_pyramid
from tests.conftest import write_prepared


def test_samplers_and_guides_are_compared_on_the_same_pictures(tmp_path) -> None:
    write_prepared(tmp_path / "data", count=192, resolution=32, low_resolution=16)
    ways = [samplers.Way("sde_dpmpp_2m", 2, guidance=1.0), samplers.Way("heun", 2, "low_band", 1.5)]
    text = samplers.sampler_table(
        tiny_pyramid(), PreparedDataset(tmp_path / "data"), 1, ways, tmp_path / "a.png"
    )
    plain, low = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines(text)[2:]]
    assert plain[:3] == ["sde_dpmpp_2m, 2", "none", "2"] and low[:2] == ["heun, 2", "low_band, 1.5"]
    assert all(np.isfinite(float(cell.rstrip("%"))) for cell in plain[3:] + low[3:])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
