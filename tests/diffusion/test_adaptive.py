"""Samplers with noise maps against the exact denoiser of a mixture: which are right, and which cannot be.

Five components in six dimensions, each dimension a patch. A sampler is judged by the total variation between the
weights of the components in its samples and the true ones, beside that of fair draws of the same size (the floor).
A few seeds each, for the sake of time; docs/results.md has means over more.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.adaptive import next_place, rank, sde_dpmpp_2m_adaptive, sigma_at
from pipeline.diffusion.noise import karras_sigmas

N, D, STEPS, DELTA = 20_000, 6, 128, 0.15
SIGMA_MAX, SIGMA_MIN = 20.0, 0.01
WEIGHTS = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05])
_G = torch.Generator().manual_seed(0)
MEANS = torch.randn(5, D, generator=_G) * 1.2
VARIANCES = (torch.randn(5, D, generator=_G) - 3).exp()  # of each component and dimension


def ahead(difficulty: Tensor) -> Tensor:
    return 1 - 2 * rank(difficulty)


def shares(z: Tensor, s: Tensor, bonus: Tensor | None = None) -> Tensor:
    """Posterior of the components [N,5], for z and S [N,6]."""
    total = VARIANCES + (s**2)[:, None]
    log = -0.5 * (((z[:, None] - MEANS) ** 2 / total).sum(-1) + total.prod(-1).log()) + WEIGHTS.log()
    return (log if bonus is None else log + bonus).softmax(1)


def exact(z: Tensor, s: Tensor, bonus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E[x | z, S] and ln(Var[x | z, S] / S^2), the exact difficulty; in parts that fit the cache."""
    parts = [torch.split(t, 2000) for t in (z, s)]
    extra = torch.split(bonus, 2000) if bonus is not None else [None] * len(parts[0])
    means, difficulties = [], []
    for z, s, more in zip(*parts, extra, strict=True):
        r, s2 = shares(z, s, more)[..., None], (s**2)[:, None]
        gain = VARIANCES / (VARIANCES + s2)
        each = MEANS + gain * (z[:, None] - MEANS)
        mean = (r * each).sum(1)
        variance = (r * (gain * s2 + each**2)).sum(1) - mean**2
        means.append(mean)
        difficulties.append((variance / s**2).clamp_min(1e-9).log())
    return torch.cat(means), torch.cat(difficulties)


def image(x: Tensor) -> Tensor:
    return x[:, None, None]


def estimate(z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    mean, h = exact(z.flatten(1), s.flatten(1))
    return image(mean), image(h)


def leaking(z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """What a denoiser learns if training maps are made from the clean image (dimensions of small variance first):
    the map tells which component it is. At sampling the map is made from the estimate, as it must be."""
    z, s = z.flatten(1), s.flatten(1)
    r = shares(z, s)
    lead = ahead((r @ VARIANCES).log())
    per_component = ahead(VARIANCES.log())
    bonus = -((lead[:, None] - per_component) ** 2).sum(-1) / (2 * 0.35**2 * D)
    return image(exact(z, s, bonus)[0]), image((r @ VARIANCES).log())


def heun_with_maps(steps: int, generator: torch.Generator) -> Tensor:
    """The probability-flow ODE, second order, with the same adaptive maps."""
    z = noisy_start(generator)
    grid = karras_sigmas(steps, SIGMA_MAX, SIGMA_MIN)[:-1]
    place = torch.zeros(N, 1, 1, D, dtype=torch.float64)
    s = torch.full_like(z, SIGMA_MAX)
    for i in range(steps - 1):
        denoised, h = estimate(z, s)
        place = next_place(place, i, steps - 1, DELTA, ahead(h))
        s_next = sigma_at(place, grid).float()
        slope = (z - denoised) / s
        euler = z + (s_next - s) * slope
        slope_next = (euler - estimate(euler, s_next)[0]) / s_next
        z, s = z + (s_next - s) * (slope + slope_next) / 2, s_next
    return z


def clean(generator: torch.Generator) -> Tensor:
    k = torch.multinomial(WEIGHTS, N, replacement=True, generator=generator)
    return MEANS[k] + VARIANCES[k].sqrt() * torch.randn(N, D, generator=generator)


def noisy_start(generator: torch.Generator) -> Tensor:
    return image(clean(generator) + SIGMA_MAX * torch.randn(N, D, generator=generator))


def adaptive(
    generator: torch.Generator,
    estimate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = estimate,
    lead: Callable[[Tensor], Tensor] = ahead,
    steps: int = STEPS,
) -> Tensor:

    def draw(i: int) -> Tensor:
        return torch.randn(N, 1, 1, D, generator=generator)

    start = noisy_start(generator)
    sigmas = karras_sigmas(steps, SIGMA_MAX, SIGMA_MIN)
    return sde_dpmpp_2m_adaptive(estimate, start, sigmas, draw, patch=1, delta=DELTA, lead=lead)


def variation(x: Tensor) -> float:
    """Total variation between the components of samples and the true weights."""
    x = x.flatten(1)
    r = shares(x, torch.full_like(x, SIGMA_MIN))
    return float((r.mean(0) - WEIGHTS).abs().sum() / 2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def floor() -> float:
    """Of fair draws."""
    return mean([variation(clean(seeded(100 + seed))) for seed in range(20)])


def test_the_stochastic_sampler_with_adaptive_maps_draws_fairly(floor: float) -> None:
    assert mean([variation(adaptive(seeded(seed))) for seed in range(4)]) < 2 * floor


def test_so_it_does_with_random_maps(floor: float) -> None:
    def made(seed: int) -> float:
        order = seeded(50 + seed)
        return variation(adaptive(seeded(seed), lead=lambda h: ahead(torch.rand(h.shape, generator=order))))

    assert mean([made(seed) for seed in range(2)]) < 2 * floor


def test_the_deterministic_sampler_with_adaptive_maps_does_not(floor: float) -> None:
    assert variation(heun_with_maps(64, seeded(0))) > 3 * floor


def test_maps_made_from_the_clean_image_spoil_the_denoiser(floor: float) -> None:
    assert variation(adaptive(seeded(0), estimate=leaking, steps=32)) > 20 * floor


def test_patches_move_forward_by_at_most_two_steps_and_all_arrive() -> None:
    place, g = torch.zeros(3, 1, 4, 4, dtype=torch.float64), seeded(0)
    for i in range(31):
        before, place = place, next_place(place, i, 31, DELTA, ahead(torch.rand(3, 1, 4, 4, generator=g)))
        assert (place >= before).all() and (place - before <= 2 + 1e-9).all()
        assert ((place - i - 1).abs() <= 31 * DELTA + 2).all()
    assert (place > 28).all() and (place <= 31).all()
    grid = karras_sigmas(32, SIGMA_MAX, SIGMA_MIN)[:-1]
    assert torch.equal(sigma_at(torch.arange(32.0).double(), grid), grid)
