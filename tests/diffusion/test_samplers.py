"""Each sampler beside the same method written in other coordinates, its order, and that a picture is its seed's.

The independent forms work in numpy float64. Those of DPM++ follow the algorithms of arXiv 2211.01095 in
variance-preserving coordinates (alpha^2 + sigma^2 = 1), where ours are variance-exploding (alpha = 1)."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.params import Sampling
from pipeline.diffusion import pyramid as pyramid_module
from pipeline.diffusion import samplers
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.samplers import ADAPTIVE, SAMPLERS, integrate, sde_dpmpp_2m
from pipeline.diffusion.schedule import grids
from pipeline.diffusion.seeds import Draw, seeded_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import Denoiser, pyramid_levels
from pipeline.models.resample import pool, upsample
from tests.builders import WIDE_SHELL, build_pyramid, captions

Array = Any  # float64 numpy array
Estimate = Callable[[Array, float], Array]  # (noisy, sigma) -> denoised


@pytest.fixture(scope="module")
def pyramid() -> Denoiser:
    """Random weights, every gain open: 16, 32 and 64 px."""
    return build_pyramid(16, (0.04, 0.01), shell=WIDE_SHELL).eval().requires_grad_(False)


def mixture(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
    """Exact for a mixture of three Gaussians in each pixel: smooth, and far from linear."""
    s2 = sigma[:, None, None, None, None] ** 2
    centres = torch.tensor([-1.0, 0.2, 1.1], dtype=noisy.dtype)
    log = -((noisy[..., None] - centres) ** 2) / (2 * (0.09 + s2))
    return (log.softmax(-1) * (centres + 0.09 / (0.09 + s2) * (noisy[..., None] - centres))).sum(-1)


def gaussian(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
    """Exact for data N(0.3, 0.5^2)."""
    return 0.3 + (noisy - 0.3) * (0.25 / (0.25 + sigma[:, None, None, None] ** 2))


# --- The same methods in other words.


def other_heun(estimate: Estimate, x: Array, sigmas: Array, noise: list[Array]) -> Array:
    """The trapezoidal rule of dx/dsigma, by predictor and corrector."""

    def slope(y: Array, s: float) -> Array:
        return y / s - estimate(y, s) / s

    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        first = slope(x, a)
        second = slope(x - (a - b) * first, b) if b > 0 else first
        x = x - (a - b) * 0.5 * first - (a - b) * 0.5 * second
    return x


def variance_preserving(
    estimate: Estimate, x: Array, sigmas: Array, noise: list[Array], stochastic: bool
) -> Array:
    alpha = 1 / np.sqrt(1 + sigmas**2)
    sigma = sigmas * alpha
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    y, model = x * alpha[0], []
    for i in range(1, len(sigmas)):
        model.append(estimate(y / alpha[i - 1], sigmas[i - 1]))
        if sigma[i] == 0:
            return model[-1] / alpha[i]
        h, combined = lam[i] - lam[i - 1], model[-1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            combined = (1 + 1 / (2 * r)) * model[-1] - 1 / (2 * r) * model[-2]
        if stochastic:
            y = sigma[i] / sigma[i - 1] * math.exp(-h) * y + alpha[i] * (1 - math.exp(-2 * h)) * combined
            y = y + sigma[i] * math.sqrt(1 - math.exp(-2 * h)) * noise[i - 1]
        else:
            y = sigma[i] / sigma[i - 1] * y - alpha[i] * (math.exp(-h) - 1) * combined
    return y / alpha[-1]


OTHERS = {
    "heun": other_heun,
    "dpmpp_2m": lambda *a: variance_preserving(*a, stochastic=False),
    "sde_dpmpp_2m": lambda *a: variance_preserving(*a, stochastic=True),
}


def both(sampler: str, denoise: Any, x: Tensor, sigmas: Tensor) -> tuple[Array, Array]:
    """(ours, the other) from the same start and the same noise."""
    text, g = captions(len(x)), torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in sigmas[:-1]]

    def estimate(y: Array, sigma: float) -> Array:
        s = torch.full((len(x),), sigma, dtype=x.dtype)
        return denoise(torch.from_numpy(y).to(x.dtype), s, text).double().numpy()

    ours = integrate(sampler, denoise, x, sigmas, text, lambda i: noise[i])
    theirs = OTHERS[sampler](
        estimate, x.double().numpy(), sigmas.numpy(), [e.double().numpy() for e in noise]
    )
    return ours.double().numpy(), theirs


@pytest.mark.parametrize("ends_at_zero", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_agrees_with_its_other_form_in_float64(sampler: str, ends_at_zero: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = 20 * torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64)
    sigmas = karras_sigmas(12, 20.0, 0.02)
    ours, theirs = both(sampler, mixture, x, sigmas if ends_at_zero else sigmas[:-1])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_agrees_with_its_other_form_on_a_network(sampler: str, pyramid: Denoiser) -> None:
    g = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(2, 3, 64, 64, generator=g)
    ours, theirs = both(sampler, pyramid, x, karras_sigmas(8, 80.0, 0.002))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_samplers_of_the_parameters_are_those_there_are() -> None:
    assert tuple(OTHERS) == SAMPLERS
    assert get_args(Sampling.model_fields["sampler"].annotation) == (*SAMPLERS, ADAPTIVE)


# --- Order and moments on Gaussian data, where the solution is known.


def error(sampler: str, steps: int) -> float:
    """Of the deterministic solution from sigma 5 to 0.2 in float64."""
    x = torch.full((1, 1, 1, 1), 5.3, dtype=torch.float64)
    sigmas = karras_sigmas(steps + 1, 5.0, 0.2)[:-1]
    out = integrate(sampler, gaussian, x, sigmas, captions(1), lambda i: x)
    return abs(float(out) - (0.3 + 5.0 * math.sqrt((0.25 + 0.04) / (0.25 + 25))))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_half_the_step_gives_a_quarter_of_the_error(sampler: str) -> None:
    errors = [error(sampler, steps) for steps in (64, 128, 256)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.12)


@pytest.mark.parametrize(("steps", "std"), [(16, 0.5400), (32, 0.5085)])
def test_dpmpp_2m_on_gaussian_data_gives_a_known_standard_deviation(steps: int, std: float) -> None:
    x = torch.full((1, 1, 1, 1), 0.3 + math.hypot(80, 0.5), dtype=torch.float64)  # mean and one std
    out = integrate("dpmpp_2m", gaussian, x, karras_sigmas(steps, 80.0, 0.002), captions(1), lambda i: x)
    assert float(out) - 0.3 == pytest.approx(std, abs=5e-5)


def moments(steps: int) -> tuple[float, float]:
    """Mean and variance that SDE-DPM++(2M) gives for data N(0.3, 0.5^2): exact, since every step is linear."""
    sigmas, start = karras_sigmas(steps, 80.0, 0.002), 80.0

    def run(x: float, kick: int) -> float:
        """The result from x with noise 1 in step `kick` and none in the others."""
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return float(sde_dpmpp_2m(gaussian, x * one, sigmas, captions(1), lambda i: one * (i == kick)))

    rest = run(0.3, -1)
    variance = (run(0.3 + math.hypot(start, 0.5), -1) - rest) ** 2
    return rest, variance + sum((run(0.3, i) - rest) ** 2 for i in range(steps - 1))


def test_the_stochastic_sampler_gives_the_mean_and_the_variance_of_gaussian_data() -> None:
    found = {steps: moments(steps) for steps in (32, 64, 128)}
    assert [mean for mean, _ in found.values()] == pytest.approx([0.3] * 3, abs=1e-9)
    assert found[32][1] == pytest.approx(0.5222**2, abs=5e-5)
    off = [abs(variance / 0.25 - 1) for _, variance in found.values()]
    assert off[0] > 3 * off[1] > 9 * off[2] and off[2] < 0.01


# --- Precision, cost, seeds.


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_has_the_precision_of_its_start(sampler: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 3, 4, 4), 9.0, dtype=dtype)
    seen: list[torch.dtype] = []

    def denoise(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        seen.extend((noisy.dtype, sigma.dtype))
        return gaussian(noisy, sigma, text)

    out = integrate(
        sampler, denoise, x, karras_sigmas(6, 9.0, 0.01), captions(1), lambda i: torch.ones(3, 4, 4)
    )
    assert {*seen, out.dtype} == {dtype}


@pytest.mark.parametrize(("sampler", "nfe"), [("heun", 2 * 9 - 1), ("dpmpp_2m", 9), ("sde_dpmpp_2m", 9)])
def test_every_call_through_the_pyramid_is_counted(sampler: str, nfe: int, pyramid: Denoiser) -> None:
    calls: list[int] = []  # px of each; the levels below count in the ones above
    hooks = [
        level.register_forward_hook(lambda module, *_: calls.append(module.resolution))
        for level in pyramid_levels(pyramid)
    ]
    images, counted = sample_pyramid(pyramid, captions(2), [0, 1], SamplerSettings(9, sampler))
    for hook in hooks:
        hook.remove()
    assert images.shape == (2, 3, 64, 64) and torch.isfinite(images).all()
    assert counted == len(calls) == nfe and set(calls) == {16, 32, 64} and calls == sorted(calls)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "sde_dpmpp_2m"])
def test_the_low_band_does_not_notice_a_lift(
    sampler: str, pyramid: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where shells add nothing, and noise is none after the start, the 2x2 means go the way of the core alone."""

    def estimate(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        if noisy.shape[-1] == 16:
            return mixture(noisy, sigma, text)
        return upsample(estimate(pool(noisy), sigma / 2, text))

    def draw(purpose: str, resolution: int) -> Tensor:
        noise = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(3))
        return noise if purpose == "noise" else torch.zeros_like(noise)

    for level in pyramid_levels(pyramid):
        monkeypatch.setattr(level, "forward", estimate)
    monkeypatch.setattr(pyramid_module, "seeded_noise", lambda *_: draw)

    def low_band() -> Tensor:
        x, _ = sample_pyramid(pyramid, captions(1), [0], SamplerSettings(9, sampler))
        return pool(pool(x))

    visited = grids(pyramid_levels(pyramid), SamplerSettings(9, sampler))
    sigmas = torch.cat([visited[0], *(grid[1:] for grid in visited[1:])]) / 4
    start = draw("noise", 16) * float(sigmas[0])
    alone = integrate(sampler, mixture, start, sigmas, captions(1), lambda _: torch.zeros_like(start))
    torch.testing.assert_close(low_band(), alone, rtol=0, atol=1e-5)
    monkeypatch.setattr(samplers.History, "upsample", lambda history: setattr(history, "last", None))
    assert float((low_band() - alone).abs().max()) > 1e-3  # a method that begins anew goes another way


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_and_its_noise_do_not_depend_on_the_batch(
    sampler: str, pyramid: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[tuple[int, str, int], Tensor] = {}

    def recorded(seeds: list[int], *others: Any) -> Draw:
        draw = seeded_noise(seeds, *others)

        def watch(purpose: str, resolution: int) -> Tensor:
            rows = draw(purpose, resolution)
            for seed, row in zip(seeds, rows, strict=True):
                known = drawn.setdefault((seed, purpose, resolution), row)
                assert torch.equal(known, row)
            return rows

        return watch

    monkeypatch.setattr(pyramid_module, "seeded_noise", recorded)
    text, seeds = captions(8), list(range(40, 48))
    settings = SamplerSettings(6, sampler, guidance=1.5, guidance_interval=(0.3, 5.0))

    def made(rows: slice) -> Tensor:
        part = text.select(rows)
        return sample_pyramid(pyramid, part, seeds[rows], settings)[0]

    together = made(slice(0, 8))
    draws = len(drawn)
    for parts in ([(i, i + 1) for i in range(8)], [(0, 3), (3, 8)]):
        alone = torch.cat([made(slice(*part)) for part in parts])
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)  # a grey level is 0.006
    assert len(drawn) == draws == 8 * (3 + (5 if sampler == "sde_dpmpp_2m" else 0))
