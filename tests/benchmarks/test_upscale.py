"""Measures of enlarged images against numbers by hand, and the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import upscale
from pipeline.data.dataset import PreparedDataset
from pipeline.models.denoiser import build_core, build_shell
from pipeline.models.snapshot import Snapshot
from tests.benchmarks.tables import lines
from tests.builders import FLAT_CORE, SHELL, snapshot_config
from tests.conftest import write_prepared


def test_structural_similarity_is_that_of_the_paper() -> None:
    """By hand: for flat images only the first factor is left; an image and its negative give a negative value."""
    flat = np.full((20, 20, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert upscale.ssim(flat, flat + np.uint8(20)) == pytest.approx(expected)
    noise = np.random.default_rng(0).integers(64, 192, (40, 40, 1), dtype=np.uint8).repeat(3, 2)
    assert upscale.ssim(noise, noise) == pytest.approx(1)
    assert -1 < upscale.ssim(noise, 255 - noise) < -0.9
    # Two images that are flat except for one pixel in the middle of the only window.
    x, y = (np.full((11, 11, 3), 100, np.uint8) for _ in range(2))
    x[5, 5], y[5, 5] = 200, 150
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = (line[5] / line.sum()) ** 2  # weight of the middle
    mx, my = 100 + 100 * w, 100 + 50 * w
    vx, vy, vxy = (d * (w - w**2) for d in (100**2, 50**2, 100 * 50))
    c2 = (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert upscale.ssim(x, y) == pytest.approx(value)


def test_psnr_is_known_for_one_level() -> None:
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert upscale.psnr(flat, flat + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)


@pytest.mark.parametrize("factor", [2, 4])
def test_upscale_table_has_every_method(factor, tmp_path) -> None:
    torch.manual_seed(0)
    denoiser = build_shell(build_core(16, 384, FLAT_CORE), 384, 0.01, {**SHELL, "bands": True})
    write_prepared(tmp_path / "data", resolution=32, low_resolution=16)
    snapshot = Snapshot(denoiser.eval(), snapshot_config(denoiser), "")
    data = PreparedDataset(tmp_path / "data")
    refined = snapshot._replace(config=snapshot_config(denoiser, "refined"))
    text = upscale.quality_table(snapshot, data, 3, tmp_path / "sheet.png", factor, refined)
    names = [line.split("|")[1].strip() for line in lines(text)[2:]]
    off = {row.split("|")[1].strip(): float(row.split("|")[7]) for row in lines(text)[2:]}
    assert off["lanczos, projected"] <= 0.5 * factor and off["fine-tuned, 8 steps"] <= 0.5 * factor
    assert off["refined, 1 step"] <= 0.5 * factor
    assert names == list(upscale.methods(snapshot, refined)) and "3 pictures of 32 px" in text
    columns, rows = len(upscale.SHEET) + 1, 3
    cell = upscale.SHEET_ZOOM * (16 + 2)
    assert Image.open(tmp_path / "sheet.png").size == (cell * columns, cell * rows)
    assert "refined, 1 step" not in upscale.methods(snapshot)
