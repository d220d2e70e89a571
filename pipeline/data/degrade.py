"""What photographs go through before somebody wants them larger: blur and JPEG. For training, on small pictures.

Needs torchvision and Pillow, and imports them when used."""

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Degrade(NamedTuple):
    """Strengths; each picture draws its own."""

    jpeg: tuple[int, ...]  # least and greatest quality, 1 to 100; (): none
    blur: float  # px, the greatest standard deviation; 0: none


def degrade(images: Tensor, strengths: Degrade, generator: torch.Generator) -> Tensor:
    """Blur, then compress, each of some pictures uint8 [n,3,R,R], on the device of `generator`; drawn from it."""
    from torchvision.transforms.v2.functional import gaussian_blur

    device = generator.device
    shares = torch.rand(len(images), 2, generator=generator, device=device).tolist()
    made = []
    for image, (blurred, quality) in zip(images.cpu(), shares, strict=True):
        if strengths.blur > 0:
            widest = 2 * ((image.shape[-1] - 1) // 2) + 1
            size = min(2 * math.ceil(3 * strengths.blur) + 1, widest)
            image = gaussian_blur(image, [size, size], [max(blurred * strengths.blur, 1e-3)] * 2)
        if strengths.jpeg:
            low, high = strengths.jpeg
            image = _jpeg(image, low + round(quality * (high - low)))
        made.append(image)
    return torch.stack(made).to(device) if made else images


def _jpeg(image: Tensor, quality: int) -> Tensor:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
