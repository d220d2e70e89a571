"""Which samples copy a training image, compared with how alike real images of different families are.

rho = d1 / d2, the distance to the nearest training family over that to the second nearest (arXiv 2505.16959),
on box means of 16 px, where noise, blur and dithering hardly count, and the least over mirrored and slightly
shifted training images. Real images are alike, too: clocks differ in their hands alone. So the rho of samples
is compared with a reference, the rho of every training image among the other families (leave one family out),
weighted to the groups of the samples' captions. Absolute limits on rho fail real images and miss blurred
copies. No claim of privacy is made (arXiv 2505.01524), and no detector is reliable (arXiv 2306.04675), so the
report also shows the nearest images.
"""

from __future__ import annotations

from collections.abc import Iterator
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
CHUNK = 500  # training images whose variants are made at once
# Of training images, so that copies which are blurred or moved are found, too: (dy, dx), px at 64 px.
SHIFTS = tuple((y, x) for y in range(-2, 3) for x in range(-2, 3))
BLURS = (1.0, 2.0)  # px at 64 px, standard deviations; unshifted


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


class TrainingImages:
    """Box means of training images and of their variants, to measure distances from."""

    def __init__(self, images: Tensor, families: Int64) -> None:
        """uint8 images [M,3,R,R] and the numbers of their families [M]."""
        self.families = families
        self._centre = _box_means(images[:CHUNK].float()).mean(
            0
        )  # distances are differences of large squares
        self._chunks = [
            torch.stack([_box_means(variant) - self._centre for variant in _variants(chunk)])
            for chunk in images.split(CHUNK)
        ]  # [V, m, d] each

    def distances(self, images: Tensor) -> Float64:
        """RMS distances [N,M], grey levels, of uint8 images [N,3,R,R] to the least distant variant of each."""
        pixels = _box_means(images.float()) - self._centre
        squares = pixels.square().sum(1)[:, None]
        parts = []
        for variants in self._chunks:
            least = torch.full((len(pixels), variants.shape[1]), torch.inf)
            for variant in variants:
                between = torch.addmm(squares + variant.square().sum(1)[None], pixels, variant.T, alpha=-2)
                torch.minimum(least, between, out=least)
            parts.append(least)
        return torch.cat(parts, 1).clamp_min(0).sqrt().double().numpy()

    def nearest(self, images: Tensor) -> Neighbours:
        """The nearest training images and families of uint8 images [N,3,R,R]."""
        between = self.distances(images)
        return Neighbours(
            between.argmin(1).astype(np.int64), *two_nearest(least_by_family(between, self.families))
        )

    def nearest_other_family(self, images: Tensor) -> Neighbours:
        """Of each training image (`images` are those of the constructor), the nearest of other families."""
        between = self.distances(images)
        between[self.families[:, None] == self.families[None]] = np.inf
        return Neighbours(
            between.argmin(1).astype(np.int64), *two_nearest(least_by_family(between, self.families))
        )


def _box_means(images: Tensor) -> Tensor:
    """Float images [N,3,R,R] as [N, 3 * 16 * 16] box means, scaled so that distances are RMS."""
    small = F.adaptive_avg_pool2d(images, min(RESOLUTION, images.shape[-1])).flatten(1)
    return small / small.shape[1] ** 0.5


def _variants(images: Tensor) -> Iterator[Tensor]:
    """Images uint8 [N,3,R,R] and their mirror images, shifted by each of SHIFTS or blurred by each of BLURS."""
    R = images.shape[-1]
    unit = max(R // 64, 1)
    for flipped in (images, images.flip(-1)):
        padded = F.pad(flipped.float(), [2 * unit] * 4, mode="replicate")
        for dy, dx in SHIFTS:
            y, x = (2 + dy) * unit, (2 + dx) * unit
            yield padded[..., y : y + R, x : x + R]
        for sigma in BLURS:
            yield blur(flipped, sigma * R / 64).float()


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
