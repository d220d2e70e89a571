"""A pyramid sampled whole and coarse to fine."""

from __future__ import annotations

import torch

from benchmarks import coarse, scale
from pipeline.data.dataset import PreparedDataset
from pipeline.models.resample import high_pass, pool, upsample
from tests.benchmarks.tables import lines, tiny_pyramid
from tests.conftest import write_prepared


def test_the_whole_pyramid_is_the_model_where_it_was_trained_and_a_wiener_filter_above() -> None:
    shell = tiny_pyramid().denoiser
    whole = coarse.WholePyramid(shell, [8.0])
    x, text = torch.randn(2, 3, 32, 32), scale.captions("cpu")
    text = text.select(torch.zeros(2, dtype=torch.long))
    sigma = torch.tensor([1.0, 2.0]) * 16 * shell.sigma_high_band
    denoised, expected = whole(x, sigma, text), shell(x, sigma, text)
    assert torch.equal(denoised[0], expected[0]) and not torch.equal(denoised[1], expected[1])
    v = shell.high_band_variance
    low = upsample(shell.below(pool(x), sigma / 2, text))
    torch.testing.assert_close(denoised[1], (low + v / (v + sigma[1] ** 2) * high_pass(x))[1])


def test_at_full_resolution_pictures_have_the_low_band_that_they_have_coarse_to_fine() -> None:
    model, seeds = tiny_pyramid(), [1, 2, 3]
    text = scale.captions("cpu").select(torch.zeros(3, dtype=torch.long))
    (whole, calls), (fine, nfe) = (
        way(model, text, seeds) for way in (coarse.at_full_resolution, coarse.coarse_to_fine)
    )
    assert calls == nfe and not torch.equal(whole, fine)
    inside = [pool(((x > 0) & (x < 255)).float()) == 1 for x in (whole, fine)]  # not clipped
    off = (pool(whole.float()) - pool(fine.float())).abs()[inside[0] & inside[1]]
    assert len(off) > 500 and off.max() < 1  # rounding


def test_ways_to_sample_differ_in_cost_as_their_steps_do(tmp_path) -> None:
    write_prepared(tmp_path / "data", resolution=32, low_resolution=16)
    text = coarse.coarse_table(tiny_pyramid(), PreparedDataset(tmp_path / "data"), 3, tmp_path / "out")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines(text)[2:]]
    assert [row[0] for row in rows] == list(coarse.ways(tiny_pyramid()))
    macs = [float(row[2]) for row in rows]
    assert macs[0] > macs[3] >= macs[2] >= macs[1] and rows[0][3] == "1.00x"  # lifts 4, 8, 16
    assert rows[4][6] and not rows[0][6]  # how far finished tiles move images
    assert (tmp_path / "out/ways.png").read_bytes().startswith(b"\x89PNG")
