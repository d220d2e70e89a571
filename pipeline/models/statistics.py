"""Mean and standard deviation of the training images, by which pixels are standardised."""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Per-channel mean and standard deviation of the pixels in [-1, 1], measured at the core's resolution."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def standardise(self, images: Tensor) -> Tensor:
        """Grey levels (uint8 or float) [B,3,R,R] to float32 with mean 0 and standard deviation 0.5 (sigma_data)."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in self)
        return (images.float() / 127.5 - 1 - mean) * (0.5 / std)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Inverse of `standardise`, rounded and clipped."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in self)
        return ((images.float() * (std / 0.5) + mean + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def clip(self, images: Tensor) -> Tensor:
        """Standardised images [B,3,R,R] within the range of pixels."""
        black, white = (
            self.standardise(torch.full((3, 1, 1), grey, device=images.device)) for grey in (0.0, 255.0)
        )
        return torch.minimum(torch.maximum(images, black), white)
