"""Losses of adversarial training against their definitions."""

import pytest
import scipy.stats
import torch

from pipeline.adversarial.losses import (
    SPREAD_FLOOR,
    difference_penalty,
    kernel_distance,
    marginal_distance,
    mean_pairwise_distance,
)
from pipeline.models.resample import high_pass, pool
from pipeline.rng import generator_for


def test_kernel_distance_agrees_with_the_definition() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=g), torch.randn(6, 5, generator=g) + 0.5
    k = lambda a, b: (float(a.double() @ b.double()) / 5 + 1) ** 3  # noqa: E731
    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 30
    xy = sum(k(a, b) for a in x for b in y) / 42
    assert float(kernel_distance(x, y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-9)
    assert float(mean_pairwise_distance(torch.tensor([[0.0], [2.0]]))) == 2
    one, half = torch.ones(3), torch.full((3,), 0.5)
    assert float(difference_penalty(one, half, weight=0.3, std=0.1)) == pytest.approx(0.3 / 0.01 * 0.25)


def test_marginal_distance_is_the_mean_of_wasserstein_distances() -> None:
    generator = generator_for(0, "images")
    fake, real = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
    real = 0.7 * real + 0.2
    bands = [(fake, real), (high_pass(fake), high_pass(real)), (high_pass(pool(fake)), high_pass(pool(real)))]
    distances = [
        scipy.stats.wasserstein_distance(a[:, c].flatten(), b[:, c].flatten())
        / (b[:, c].std() + SPREAD_FLOOR)
        for a, b in bands
        for c in range(3)
    ]
    assert float(marginal_distance(fake, real)) == pytest.approx(sum(map(float, distances)) / 9, rel=1e-5)


def test_marginal_distance_sees_contrast_blur_and_grain_but_not_places() -> None:
    generator = generator_for(0, "images")
    real = (torch.rand(4, 3, 16, 16, generator=generator) > 0.7).float()
    assert marginal_distance(real.flip(0).roll((8, 8), dims=(2, 3)), real) < 1e-6
    for damaged in (
        0.9 * real,
        (real + real.roll(1, dims=3)) / 2,
        real + 0.03 * torch.randn(real.shape, generator=generator),
    ):
        assert marginal_distance(damaged, real) > 0.02


def test_marginal_distance_of_an_even_image_has_a_finite_gradient() -> None:
    fake = torch.zeros(1, 3, 8, 8, requires_grad=True)
    marginal_distance(fake, torch.zeros(1, 3, 8, 8)).backward()
    assert fake.grad is not None and bool(fake.grad.isfinite().all())
