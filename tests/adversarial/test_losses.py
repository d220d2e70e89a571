"""Losses of adversarial training against their definitions."""

import pytest
import torch

from pipeline.adversarial.losses import difference_penalty, kernel_distance, mean_pairwise_distance


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
