"""Which samples copy a training image, compared with how alike real images of different families are.

rho = d1 / d2, the distance to the nearest training family over that to the second nearest (arXiv 2505.16959),
on box means of 16 px, where noise, blur and dithering hardly count, and the least over mirrored and slightly
shifted training images. Real images are alike, too: clocks differ in their hands alone. So the rho of samples
is compared with a reference, the rho of training images among the other families (leave one family out),
weighted to the groups of the samples' captions. Absolute limits on rho fail real images and miss blurred
copies. No claim of privacy is made (arXiv 2505.01524), and no detector is reliable (arXiv 2306.04675), so the
report also shows the nearest images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.damage import blur
from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.statistics import Int64

ALIKE = 1 / 3  # rho below which a sample is much nearer to one family than to all others
REPLICA_QUANTILE = 0.01  # of the reference's rho
REPLICA_DISTANCE = 4.0  # grey levels
RESOLUTION = 16
CHUNK = 500  # images of 64 px at once
# Of training images at 64 px (above it, their box means), so that copies which are blurred or moved are found, too:
SHIFTS = tuple((y, x) for y in range(-2, 3) for x in range(-2, 3))  # px, whole ones below 64 px, too
BLURS = (1.0, 2.0)  # standard deviations in px, in proportion below 64 px; unshifted


@dataclass(frozen=True)
class Neighbours:
    """For each of n images: the nearest training image, its distance, and the distance of the second family."""

    row: Int64  # of the training images
    d1: Float64  # RMS difference of box means, grey levels 0..255
    d2: Float64

    @property
    def rho(self) -> Float64:
        """d1 / d2: 0 for an exact copy, 1 where two families are equally near."""
        ratio: Float64 = self.d1 / np.maximum(self.d2, 1e-12)
        return ratio

    def split(self, sizes: Sequence[int]) -> list[Neighbours]:
        """Those of consecutive parts of the images."""
        ends = np.cumsum(sizes)[:-1]
        parts = (np.split(each, ends) for each in (self.row, self.d1, self.d2))
        return [Neighbours(*part) for part in zip(*parts, strict=True)]


class TrainingImages:
    """All training images and their variants, to measure distances from. They are loaded and varied in chunks at
    every search, so that memory does not grow with their number and time is linear in it."""

    def __init__(self, load: Callable[[Int64], Tensor], families: Int64) -> None:
        """`load` gives the uint8 images [m,3,R,R] of numbers [m] below M; `families` are numbers, too, [M]."""
        self.load = load
        self.families = families

    def nearest(self, small: Tensor, left_out: Int64 | None = None) -> Neighbours:
        """The nearest training images and families of `thumbnails` [N,d]; of image i without the family
        left_out[i]. The two distances are equal where there is one family only."""
        row = np.zeros(len(small), dtype=np.int64)
        least, family = np.full((len(small), 2), np.inf), np.full((len(small), 2), -1)
        for numbers, between in self._distances(small):
            names, place = np.unique(self.families[numbers], return_inverse=True)
            if left_out is not None:
                between[left_out[:, None] == self.families[numbers]] = np.inf
            row = np.where(between.min(1) < least[:, 0], numbers[between.argmin(1)], row)
            known = np.concatenate([least, least_by_family(between, place)], 1)
            known_family = np.concatenate([family, np.broadcast_to(names, (len(small), len(names)))], 1)
            for i in range(2):
                best = known.argmin(1)[:, None]
                least[:, i] = np.take_along_axis(known, best, 1)[:, 0]
                family[:, i] = np.take_along_axis(known_family, best, 1)[:, 0]
                known[known_family == family[:, i, None]] = np.inf
        d1, d2 = least.T
        return Neighbours(row, d1, np.where(np.isinf(d2), d1, d2))

    def by_family(self, small: Tensor) -> Float64:
        """Distances [N,F] of `thumbnails` [N,d] to the nearest image of each family."""
        least = np.full((int(self.families.max()) + 1, len(small)), np.inf)
        for numbers, between in self._distances(small):
            np.minimum.at(least, self.families[numbers], between.T)
        return least.T

    def _distances(self, small: Tensor) -> Iterator[tuple[Int64, Float64]]:
        """RMS distances, grey levels, to the least distant variant of each training image: the numbers [m] of a
        chunk of them, and distances [N,m]."""
        size = _chunk(self.load(np.zeros(1, dtype=np.int64)).shape[-1])
        for start in range(0, len(self.families), size):
            numbers = np.arange(start, min(start + size, len(self.families)))
            images = self.load(numbers)
            if start == 0:  # distances are differences of large squares
                centre = thumbnails(images).mean(0)
                pixels = small - centre
                squares = pixels.square().sum(1)[:, None]
            least = torch.full((len(small), len(numbers)), torch.inf)
            for variant in _variants(images):
                moved = variant - centre
                between = torch.addmm(squares + moved.square().sum(1)[None], pixels, moved.T, alpha=-2)
                torch.minimum(least, between, out=least)
            yield numbers, least.clamp_min(0).sqrt().double().numpy()


def _chunk(resolution: int) -> int:
    """How many images of a resolution are handled at once."""
    return max(CHUNK * 64**2 // max(resolution, 64) ** 2, 1)


def thumbnails(images: Tensor) -> Tensor:
    """uint8 images [N,3,R,R] as float32 [N,d] box means of 16 px, d = 3 * 16 * 16, scaled so that distances are
    RMS."""
    R = images.shape[-1]
    parts = images.split(_chunk(R))
    return torch.cat([_scaled(F.avg_pool2d(part.float(), max(R // RESOLUTION, 1))) for part in parts])


def _scaled(means: Tensor) -> Tensor:
    flat = means.flatten(1)
    return flat / flat.shape[1] ** 0.5


def _variants(images: Tensor) -> Iterator[Tensor]:
    """`thumbnails` [m,d] of uint8 images [m,3,R,R] shifted by each of SHIFTS or blurred by each of BLURS, and of
    their mirror images."""
    small = F.avg_pool2d(images.float(), max(images.shape[-1] // 64, 1))
    R = small.shape[-1]
    size = min(RESOLUTION, R)
    box = R // size
    means = F.avg_pool2d(F.pad(small, [2] * 4, mode="replicate"), box, stride=1)  # of boxes at every place
    for dy, dx in SHIFTS:
        y, x = (slice(2 + d, 3 + d + box * (size - 1), box) for d in (dy, dx))
        yield from _with_mirrored(means[..., y, x])
    for sigma in BLURS:
        yield from _with_mirrored(F.avg_pool2d(blur(small, sigma * R / 64).float(), box))


def _with_mirrored(means: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled(means), _scaled(means.flip(-1))


def least_by_family(between: Float64, families: Int64) -> Float64:
    """Distances [N,F] to the nearest image of each family, from those to images [N,M] and their families
    [M]."""
    least = np.full((int(families.max()) + 1, len(between)), np.inf)
    np.minimum.at(least, families, between.T)
    return least.T


def two_nearest(by_family: Float64) -> tuple[Float64, Float64]:
    """The least and the second least of distances [N,F]: d1 [N] and d2 [N], which are equal where F is 1."""
    if by_family.shape[1] == 1:
        return by_family[:, 0], by_family[:, 0]
    two = np.partition(by_family, 1, axis=1)
    return two[:, 0], two[:, 1]
