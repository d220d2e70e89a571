"""The shape of images at any level of a pyramid, and images of several sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Images = Tensor | Sequence[Tensor]  # [N,3,H,W], or images [3,H,W] of several sizes


class Shape(NamedTuple):
    """The sides of images in units of their resolution, a power of two near the root of their area: 1 and 1 of
    square ones. An image of 160 x 96 px at a resolution of 128 px has 40 x 24 px where the resolution is 32 px."""

    height: float
    width: float

    def at(self, resolution: int) -> tuple[int, int]:
        """(height, width) in px at a level of the pyramid."""
        return round(self.height * resolution), round(self.width * resolution)

    @classmethod
    def of(cls, images: Tensor, resolution: int) -> "Shape":
        """The shape of images [...,H,W] of a resolution."""
        return cls(images.shape[-2] / resolution, images.shape[-1] / resolution)


SQUARE = Shape(1.0, 1.0)


def by_size(images: Images) -> list[tuple[list[int], Tensor]]:
    """(places, images [n,3,H,W]) of each size, in the order of their first images."""
    if isinstance(images, Tensor):
        return [(list(range(len(images))), images)]
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    return [(own, torch.stack([images[place] for place in own])) for own in places.values()]


def in_order(images: Mapping[int, Tensor]) -> Images:
    """Images [3,H,W] by place."""
    ordered = [images[place] for place in range(len(images))]
    return torch.stack(ordered) if len({image.shape for image in ordered}) == 1 else ordered


def take(images: Images, places: Sequence[int] | NDArray[np.int64]) -> Images:
    """The images at some places."""
    if isinstance(images, Tensor):
        return images[torch.as_tensor(places)]
    return in_order(dict(enumerate(images[int(place)] for place in places)))


def squashed(images: Images, resolution: int) -> Tensor:
    """uint8 images as squares [N,3,R,R], stretched by area means where they are not."""

    def squash(alike: Tensor) -> Tensor:
        if alike.shape[2] == alike.shape[3]:
            return alike
        return F.adaptive_avg_pool2d(alike.float(), resolution).round().to(torch.uint8)

    stretched = map_images(squash, images)
    assert isinstance(stretched, Tensor)
    return stretched


def on_one_canvas(images: Images, colour: int = 255) -> Tensor:
    """Images in the middle of canvases of one grey, as high as the highest and as wide as the widest: [N,3,H,W]."""
    if isinstance(images, Tensor):
        return images
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = []
    for image in images:
        down, across = height - image.shape[1], width - image.shape[2]
        sides = [across // 2, across - across // 2, down // 2, down - down // 2]
        padded.append(F.pad(image, sides, value=colour))
    return torch.stack(padded)


def mean_over(means: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The mean of float32 means over so many images each, as float32."""
    total = torch.stack([mean.double() * count for mean, count in means]).sum()
    return (total / sum(count for _, count in means)).float()


def map_images(change: Callable[[Tensor], Tensor], images: Images) -> Images:
    """`change` applied to the images [n,3,H,W] of each size, in their places."""
    if isinstance(images, Tensor):
        return change(images)
    changed: dict[int, Tensor] = {}
    for places, alike in by_size(images):
        changed |= zip(places, change(alike), strict=True)
    return in_order(changed)
