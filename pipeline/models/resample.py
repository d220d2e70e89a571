"""The resampling operators of the pyramid: pooling P, upsampling U, high-pass HP = 1 - U P."""

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling `U`, the right inverse of `pool`: [B,C,H,W] -> [B,C,2H,2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def pool(x: Tensor) -> Tensor:
    """Exact 2x2 box mean `P`: [B,C,2H,2W] -> [B,C,H,W]."""
    return F.avg_pool2d(x, 2)


def resize(x: Tensor, width: int) -> Tensor:
    """Double or halve a map until it is `width` wide: [B,C,h,w] -> [B,C,h width/w,width]."""
    while x.shape[-1] < width:
        x = upsample(x)
    while x.shape[-1] > width:
        x = pool(x)
    return x


def rescale(x: Tensor, resolution: int) -> Tensor:
    """Double or halve images [B,C,H,W] until they have `resolution`, the power of two nearest to the root of their
    area."""
    while 2 * x.shape[-2] * x.shape[-1] < resolution**2:
        x = upsample(x)
    while x.shape[-2] * x.shape[-1] > 2 * resolution**2:
        x = pool(x)
    return x


def rescale_bytes(images: Tensor, resolution: int) -> Tensor:
    """`rescale` of uint8 images [B,C,H,W], rounded."""
    return rescale(images.float(), resolution).round().to(torch.uint8)


def high_pass(x: Tensor) -> Tensor:
    """What pooling loses, `HP = I - U P`; an orthogonal projection that keeps 3/4 of the dimensions."""
    return x - upsample(pool(x))
