"""Guides: what each leads away from, what it costs, and what it leaves alone."""

from typing import get_args

import pytest
import torch

from pipeline.config.params import Sampling
from pipeline.diffusion.guidance import GUIDES, Guided, early_estimate, guide_of
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import Denoiser, ShellDenoiser
from pipeline.models.resample import high_pass, pool, upsample
from tests.builders import WIDE_SHELL, build_pyramid, captions


def model(seed: int) -> ShellDenoiser:
    """Random weights, every gain open: 16 and 32 px."""
    return build_pyramid(16, shell=WIDE_SHELL, seed=seed).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[ShellDenoiser, ShellDenoiser]:
    """(the model, the same with early weights)."""
    return model(0), model(1)


def guided(name: str, level: Denoiser, early: Denoiser, weight: float, scale: float = 1.0) -> Guided:
    return Guided(level, weight, (0.3, 5.0), scale, guide_of(name, level, early))


def test_the_guides_of_the_parameters_are_those_there_are() -> None:
    assert get_args(Sampling.model_fields["guide"].annotation) == GUIDES


def test_a_core_is_led_away_from_its_early_weights(pair: tuple[ShellDenoiser, ShellDenoiser]) -> None:
    core, early = pair[0].below, pair[1].below
    x, sigma, text = torch.randn(2, 3, 16, 16), torch.full((2,), 0.8), captions(2)
    by_early = guided("early_weights", core, early, 2.5)
    ours = by_early(x, sigma, text)
    torch.testing.assert_close(ours, 2.5 * core(x, sigma, text) - 1.5 * early(x, sigma, text))
    assert by_early.nfe == 2


def test_an_early_shell_stands_on_the_finished_core_and_its_low_band_is_the_early_cores(
    pair: tuple[ShellDenoiser, ShellDenoiser],
) -> None:
    shell, early = pair
    z, sigma, text = torch.randn(2, 3, 32, 32), torch.full((2,), 1.6), captions(2)
    estimate = early_estimate(early, shell, z, sigma, text)
    torch.testing.assert_close(pool(estimate), early.below(pool(z), sigma / 2, text), atol=1e-5, rtol=1e-5)
    below = shell.below.estimate(pool(z), sigma / 2, text)
    octave = early.add_octave(z, below, sigma, text).denoised
    torch.testing.assert_close(high_pass(estimate), high_pass(octave), atol=1e-5, rtol=1e-5)


def test_guided_by_early_weights_a_shell_keeps_the_guided_core_below(
    pair: tuple[ShellDenoiser, ShellDenoiser],
) -> None:
    shell, early = pair
    z, sigma, text = torch.randn(2, 3, 32, 32), torch.full((2,), 1.6), captions(2)
    above = guided("early_weights", shell, early, 2.0, scale=0.5)(z, sigma, text)
    below = guided("early_weights", shell.below, early.below, 2.0)(pool(z), sigma / 2, text)
    torch.testing.assert_close(pool(above), below, atol=2e-5, rtol=1e-4)


def test_early_weights_that_are_the_last_ones_change_nothing(
    pair: tuple[ShellDenoiser, ShellDenoiser],
) -> None:
    shell = pair[0]
    z, sigma, text = torch.randn(2, 3, 32, 32), torch.full((2,), 1.6), captions(2)
    out = guided("early_weights", shell, shell, 3.0)(z, sigma, text)
    torch.testing.assert_close(out, shell(z, sigma, text), atol=2e-5, rtol=1e-4)


def test_the_low_guide_scales_the_high_band_without_another_call(
    pair: tuple[ShellDenoiser, ShellDenoiser],
) -> None:
    shell, early = pair
    z, sigma, text = torch.randn(2, 3, 32, 32), torch.full((2,), 1.6), captions(2)
    low = guided("low_band", shell, early, 1.5)
    out, below = low(z, sigma, text), upsample(shell.below(pool(z), sigma / 2, text))
    torch.testing.assert_close(out, below + 1.5 * (shell(z, sigma, text) - below), atol=2e-5, rtol=1e-4)
    assert low.nfe == 1
    x = pool(z)
    core, usual = (guided(name, shell.below, early.below, 1.5) for name in ("low_band", "unconditional"))
    assert torch.equal(core(x, sigma, text), usual(x, sigma, text)) and core.nfe == 2


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_of_weight_one_or_outside_the_interval_is_not_asked(
    name: str, pair: tuple[ShellDenoiser, ShellDenoiser]
) -> None:
    shell, early = pair
    z, text = torch.randn(1, 3, 32, 32), captions(1)
    for weight, sigma in ((1.0, torch.ones(1)), (2.0, torch.full((1,), 9.0))):
        one = guided(name, shell, early, weight)
        assert torch.equal(one(z, sigma, text), shell(z, sigma, text)) and one.nfe == 1


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "sde_dpmpp_2m"])
def test_every_guide_goes_with_every_sampler(sampler: str, pair: tuple[ShellDenoiser, ShellDenoiser]) -> None:
    shell, early = pair
    cost = {}
    for guide in GUIDES:
        settings = SamplerSettings(9, sampler, guide, 1.5, (0.3, 5.0))
        x, cost[guide] = sample_pyramid(shell, captions(1), [0], settings, early)
        assert torch.isfinite(x).all()
    assert cost["low_band"] < cost["early_weights"] == cost["unconditional"]
