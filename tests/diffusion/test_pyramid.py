"""Samplers against exact denoisers: Gaussian data, where everything is known, and a mixture."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.guidance import Guided
from pipeline.diffusion.noise import karras_sigmas, truncated_lognormal_sigma
from pipeline.diffusion.pyramid import to_next_octave
from pipeline.diffusion.samplers import heun, sde_dpmpp_2m
from pipeline.diffusion.seeds import seeded_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import pool


def no_text(n: int) -> Conditioning:
    return Conditioning(torch.zeros(n, 4), torch.zeros(n, 2, 4), torch.zeros(n, 2, dtype=torch.bool))


def gaussian_denoiser(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
    """Exact for data N(0, 0.5^2)."""
    return noisy * (0.25 / (0.25 + sigma[:, None, None, None] ** 2))


@pytest.mark.parametrize(("steps", "std"), [(18, 0.5276), (32, 0.5078)])
def test_heun_on_gaussian_data_gives_the_known_standard_deviation(steps: int, std: float) -> None:
    x = 80 * torch.ones(1, 1, 1, 1, dtype=torch.float64)  # the map is linear: follow one standard deviation
    sigmas = karras_sigmas(steps, 80.0, 0.002)
    out = heun(gaussian_denoiser, x, sigmas, no_text(1))
    assert float(out) == pytest.approx(std, abs=5e-5)


def independent_heun(x: float, steps: int) -> float:
    """Scalar Heun in plain Python, from algorithm 1 of arXiv 2206.00364."""
    grid = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)]
    grid.append(0.0)
    for a, b in pairwise(grid):
        d = (x - x * 0.25 / (0.25 + a * a)) / a
        y = x + (b - a) * d
        if b:
            y = x + (b - a) * (d + (y - y * 0.25 / (0.25 + b * b)) / b) / 2
        x = y
    return x


def test_heun_agrees_with_a_plain_python_implementation() -> None:
    x = torch.full((1, 1, 1, 1), 3.7, dtype=torch.float64)
    out = heun(gaussian_denoiser, x, karras_sigmas(12, 80.0, 0.002), no_text(1))
    assert float(out) == pytest.approx(independent_heun(3.7, 12), rel=1e-9)


def test_the_stochastic_sampler_draws_from_a_mixture_with_the_right_weights() -> None:
    centres, std, weights = torch.tensor([-1.0, 0.2, 1.1]), 0.1, torch.tensor([0.5, 0.2, 0.3])

    def exact(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        s2 = sigma[:, None, None, None] ** 2
        log = weights.log() - (noisy[..., None] - centres) ** 2 / (2 * (std**2 + s2[..., None]))
        mean = centres + std**2 / (std**2 + s2[..., None]) * (noisy[..., None] - centres)
        return (log.softmax(-1) * mean).sum(-1)

    generator = torch.Generator().manual_seed(0)
    n = 20000
    start = 20 * torch.randn(n, 1, 1, 1, generator=generator)
    draw = lambda i: torch.randn(n, 1, 1, 1, generator=generator)  # noqa: E731
    x = sde_dpmpp_2m(exact, start, karras_sigmas(64, 20.0, 0.01), no_text(n), draw).flatten()
    nearest = (x[:, None] - centres).abs().argmin(dim=1)
    found = torch.bincount(nearest, minlength=3) / n
    assert (found - weights).abs().sum() / 2 < 0.02  # total variation; a fair draw of n has about 0.004
    for i, centre in enumerate(centres):
        part = x[nearest == i]
        assert float(part.mean()) == pytest.approx(float(centre), abs=0.01)
        assert float(part.std()) == pytest.approx(std, rel=0.08)


def test_the_last_step_of_the_stochastic_sampler_returns_the_estimate() -> None:
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    out = sde_dpmpp_2m(gaussian_denoiser, x, torch.tensor([0.7, 0.0]), no_text(2), lambda i: x)
    torch.testing.assert_close(out, gaussian_denoiser(x, torch.full((2,), 0.7), no_text(2)))


def test_lifted_noise_is_white_and_keeps_the_low_band() -> None:
    generator = torch.Generator().manual_seed(2)
    low = 0.7 * torch.randn(20000, 1, 2, 2, generator=generator)
    z = to_next_octave(low, 1.4, torch.randn(20000, 1, 4, 4, generator=generator))
    torch.testing.assert_close(pool(z), low, atol=1e-6, rtol=0)
    covariance = torch.cov(z.flatten(1).T)
    assert (covariance - 1.96 * torch.eye(16)).abs().max() < 0.07


def test_guidance_of_one_calls_once_and_guidance_in_the_interval_calls_twice() -> None:
    def denoiser(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        return noisy * 0 + text.mask.any(dim=1).float()[:, None, None, None]

    x, text = (
        torch.zeros(3, 1, 2, 2),
        Conditioning(torch.zeros(3, 4), torch.zeros(3, 2, 4), torch.ones(3, 2) > 0),
    )
    plain = Guided(denoiser, 1.0, (0.3, 5.0))
    assert float(plain(x, torch.full((3,), 1.0), text).mean()) == 1 and plain.nfe == 1
    guided = Guided(denoiser, 3.0, (0.3, 5.0))
    assert float(guided(x, torch.full((3,), 1.0), text).mean()) == 3 and guided.nfe == 2
    assert float(guided(x, torch.full((3,), 9.0), text).mean()) == 1 and guided.nfe == 3


def test_a_seed_gives_the_same_noise_in_any_batch() -> None:
    alone, among = seeded_noise([5])("noise", 4), seeded_noise([1, 5, 9])("noise", 4)
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(alone, seeded_noise([5])("lift", 4))


def test_truncated_levels_stay_below_the_bound_and_keep_their_median() -> None:
    generator = torch.Generator().manual_seed(3)
    sigma = truncated_lognormal_sigma(50000, math.log(0.2), 1.4, 3.4, generator)
    assert float(sigma.max()) <= 3.4 * (1 + 1e-5)
    below = 0.5 * (1 + math.erf((math.log(3.4 / 0.2)) / 1.4 / math.sqrt(2)))
    assert float((sigma < 0.2).float().mean()) == pytest.approx(0.5 / below, abs=0.01)
