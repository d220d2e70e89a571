"""Noise from one seed per image, so that an image does not depend on the batch it is generated in."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.models.shape import SQUARE, Shape
from pipeline.rng import key

Draw = Callable[[str, int], Tensor]  # (purpose, resolution) to white noise [N,3,R,R], or of another shape


def seeded_noise(seeds: Sequence[int], device: str | torch.device = "cpu", shape: Shape = SQUARE) -> Draw:
    """Return draw(purpose, resolution): standard normal [N,3,H,W], of `shape`, image i from seeds[i] alone.

    Drawn on the CPU, so that a seed means the same image on every device."""

    def draw(purpose: str, resolution: int) -> Tensor:
        rows = [
            torch.randn(3, *shape.at(resolution), generator=torch.Generator().manual_seed(key(seed, purpose)))
            for seed in seeds
        ]
        return torch.stack(rows).to(device)

    return draw


def step_noise(draw: Draw, resolution: int, i: int) -> Tensor:
    """Noise of step i of a stochastic sampler at one resolution."""
    return draw(f"step-{resolution}-{i}", resolution)
