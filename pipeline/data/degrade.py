"""Blur and JPEG compression, which photographs have often been through before someone wants them larger.

Applied to the low-resolution inputs when a shell learns to upscale. Imports torchvision and Pillow when used."""

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Degrade(NamedTuple):
    """Strengths; each image draws its own up to these."""

    jpeg: tuple[int, ...]  # lowest and highest quality, 1 to 100; (): no compression
    blur: float  # px, the largest standard deviation; 0: no blur


def degrade(images: Tensor, strengths: Degrade, generator: torch.Generator) -> Tensor:
    """Blur, then compress, images uint8 [n,3,R,R], each by strengths drawn from `generator`, on its device."""
    from torchvision.transforms.v2.functional import gaussian_blur

    device = generator.device
    draws = torch.rand(len(images), 2, generator=generator, device=device).tolist()
    degraded = []
    for image, (blur, quality) in zip(images.cpu(), draws, strict=True):
        if strengths.blur > 0:
            widest = 2 * ((min(image.shape[1:]) - 1) // 2) + 1
            size = min(2 * math.ceil(3 * strengths.blur) + 1, widest)
            image = gaussian_blur(image, [size, size], [max(blur * strengths.blur, 1e-3)] * 2)
        if strengths.jpeg:
            low, high = strengths.jpeg
            image = _jpeg(image, low + round(quality * (high - low)))
        degraded.append(image)
    return torch.stack(degraded).to(device) if degraded else images


def _jpeg(image: Tensor, quality: int) -> Tensor:
    # torchvision's own encoder gives the same bytes, but is deprecated.
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
