"""The error to the paired real image, which anchors the student."""

import pytest
import torch

from pipeline.adversarial.step import phase_error
from pipeline.models.resample import pool
from pipeline.rng import generator_for


def test_the_anchor_sees_a_dither_that_pooling_hides_and_leaves_edges_their_place() -> None:
    real = torch.zeros(1, 3, 16, 16)
    real[..., 6:10] = 1
    dither = 0.2 * (1 - 2 * (torch.arange(16) % 2)).expand_as(real)
    assert pool(dither).abs().max() < 1e-7
    assert phase_error(real + dither, real, 8) == pytest.approx(0.04, rel=1e-5)
    moved = real.roll(1, dims=3)
    assert phase_error(moved, real, 8) < 0.6 * (moved - real).square().mean()
    noise = torch.randn(real.shape, generator=generator_for(0, "noise"))
    assert phase_error(noise, real, 16) == (pool(noise) - pool(real)).square().mean()
