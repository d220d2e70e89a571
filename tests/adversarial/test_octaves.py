"""After refinement each octave of samples has the power of the real images' octave."""

from dataclasses import replace

import pytest
import torch

from pipeline.adversarial.few_step import few_step
from pipeline.adversarial.octaves import match_octaves, sampled_power
from pipeline.diffusion.seeds import seeded_noise
from pipeline.models.denoiser import ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, resize
from pipeline.models.shape import SQUARE
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from tests.builders import build_pyramid, captions, snapshot_config

COUNT = 8
SQUARES = [(range(COUNT), SQUARE)]


def refined(gain: float = 0.7) -> Snapshot:
    denoiser = build_pyramid(8, (0.04, 0.02), gain=gain).requires_grad_(False)
    config = snapshot_config(denoiser, "refined", passes=(1, 2), sigma_start=5.0)
    return Snapshot(denoiser, config, "")


def shells_of(snapshot: Snapshot) -> list[ShellDenoiser]:
    return [level for level in pyramid_levels(snapshot.denoiser) if isinstance(level, ShellDenoiser)]


def samples_of(snapshot: Snapshot) -> torch.Tensor:
    draw = seeded_noise(range(COUNT), "cpu")
    drawn = torch.cat([few_step(snapshot.denoiser, captions(COUNT), draw, n, 5.0)[-1] for n in (1, 2)])
    return in_range(snapshot, drawn)


def in_range(snapshot: Snapshot, images: torch.Tensor) -> torch.Tensor:
    return snapshot.statistics.standardise(snapshot.statistics.to_uint8(images))


def test_octaves_that_are_a_few_percent_off_get_the_power_of_real_ones() -> None:
    snapshot, wanted = refined(), samples_of(refined())
    for shell, factor in zip(shells_of(snapshot), (0.95, 1.04), strict=True):
        shell.net.out_gain *= factor
    factors = match_octaves(snapshot, wanted, captions(COUNT).doubled(), [*range(COUNT)] * 2)
    assert list(factors) == [16, 32]
    assert list(factors.values()) == pytest.approx([1 / 0.95, 1 / 1.04], rel=0.01)
    for shell in shells_of(snapshot):
        power = sum(
            float(sampled_power(shell, snapshot, captions(COUNT), range(COUNT), n, SQUARES)) for n in (1, 2)
        )
        real = high_pass(resize(wanted, shell.resolution)).square().mean()
        assert power / 2 == pytest.approx(float(real), rel=0.02)


def test_what_pixels_cannot_show_is_no_power() -> None:
    """On a white ground half of an overshoot is clipped."""
    snapshot = refined()
    bright = replace(snapshot.config, statistics=Statistics((0.95,) * 3, (0.5,) * 3))
    clipped = snapshot._replace(config=bright)
    shell = shells_of(snapshot)[-1]
    power, less = (
        sampled_power(shell, each, captions(COUNT), range(COUNT), 1, SQUARES) for each in (snapshot, clipped)
    )
    assert float(less) < 0.8 * float(power)


@pytest.mark.parametrize("wanted", [torch.ones(COUNT, 3, 32, 32), torch.randn(COUNT, 3, 32, 32)])
@pytest.mark.parametrize("gain", [0.0, 0.7])
def test_octaves_that_are_far_off_are_left_alone(wanted: torch.Tensor, gain: float) -> None:
    snapshot = refined(gain)
    assert set(match_octaves(snapshot, wanted, captions(COUNT), range(COUNT)).values()) == {1.0}
    assert all(float(shell.net.out_gain) == pytest.approx(gain) for shell in shells_of(snapshot))
