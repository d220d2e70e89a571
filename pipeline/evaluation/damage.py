"""Damage of known strength, to plant in real images: a distance that does not see it cannot be trusted.

Every function maps uint8 images [N,3,H,W] to new ones of the same shape, and gives the same bits each time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.degrade import Degrade, degrade
from pipeline.rng import generator_for

BAYER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])


def blur(images: Tensor, sigma_px: float) -> Tensor:
    """Blurred by a Gaussian of standard deviation `sigma_px`; mirrored at the edges."""
    return _to_uint8(_gaussian(images, sigma_px))


def sharpen(images: Tensor, amount: float) -> Tensor:
    """Over-sharpened: what a blur of 1 px takes away, added `amount` times (unsharp masking)."""
    return _to_uint8(images + amount * (images - _gaussian(images, 1.0)))


def dither(images: Tensor, levels: int) -> Tensor:
    """Reduced to `levels` values per channel (at least 2), by ordered dithering with Bayer's 4x4 matrix."""
    assert levels >= 2
    height, width = images.shape[2:]
    repeats = math.ceil(height / 4), math.ceil(width / 4)
    threshold = ((BAYER + 0.5) / 16).repeat(repeats)[:height, :width].to(images.device)
    step = 255 / (levels - 1)
    return _to_uint8((images / step + threshold).floor() * step)


def add_noise(images: Tensor, std: float, seed: int) -> Tensor:
    """With independent Gaussian noise of `std` grey levels on every value, clipped."""
    generator = generator_for(seed, "damage/noise")
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return _to_uint8(images + std * noise)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Compressed as JPEG of `quality` 1 to 100, and decoded."""
    return degrade(images, Degrade((quality, quality), 0.0), torch.Generator(images.device))


def shift(images: Tensor, px: int) -> Tensor:
    """Moved by `px` pixels to the right and down (negative: left and up); the edge is repeated."""
    down, across = (
        (torch.arange(side, device=images.device) - px).clamp(0, side - 1) for side in images.shape[2:]
    )
    return images[..., down, :][..., across]


def noise_like(images: Tensor, seed: int) -> Tensor:
    """No picture at all: every value drawn uniformly from 0 to 255."""
    generator = generator_for(seed, "damage/noise_like")
    noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return noise.to(images.device)


def _gaussian(images: Tensor, sigma_px: float) -> Tensor:
    """float32 images [N,3,H,W], convolved with a Gaussian cut off at 3 standard deviations, or a side less 1."""
    radius = min(math.ceil(3 * sigma_px), min(images.shape[2:]) - 1)
    x = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (x / sigma_px) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1)  # [3, 2 radius + 1]
    padded = F.pad(images.float(), [radius] * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[:, None, None, :], groups=3)
    return F.conv2d(rows, kernel[:, None, :, None], groups=3)


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
