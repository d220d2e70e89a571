"""Noise of images from seeds of their own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.rng import key

Draw = Callable[[str, int], Tensor]


def seeded_noise(seeds: Sequence[int], device: str | torch.device = "cpu") -> Draw:
    """Return draw(purpose, resolution): standard normal [N,3,R,R], image i from seeds[i] alone.

    Drawn on the CPU, so that a seed means the same picture on every device."""

    def draw(purpose: str, resolution: int) -> Tensor:
        rows = [
            torch.randn(
                3, resolution, resolution, generator=torch.Generator().manual_seed(key(seed, purpose))
            )
            for seed in seeds
        ]
        return torch.stack(rows).to(device)

    return draw


def step_noise(draw: Draw, resolution: int, i: int) -> Tensor:
    return draw(f"step-{resolution}-{i}", resolution)
