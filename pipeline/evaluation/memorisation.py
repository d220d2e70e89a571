"""Which samples copy a training picture.

A sample is a copy if its nearest training base is less than a third as far as the second nearest (arXiv
2505.16959), in pixels at 32 px, mirrored pictures included. No detector is reliable (arXiv 2306.04675), so
the report also shows the nearest pictures. The data-copying test C_T (arXiv 2004.05675) asks, for the whole
set, whether samples lie closer to the training set than other real pictures do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.metrics import Float64, Metric, distances, enough
from pipeline.evaluation.statistics import Int64, number_units

COPY_RATIO = 1 / 3
RESOLUTION = 32


@dataclass(frozen=True)
class Neighbours:
    """For each of n samples: row of the nearest training image, its distance, and that of the second base."""

    row: Int64
    d1: Float64  # RMS difference a pixel and channel, grey levels 0..255
    d2: Float64

    @property
    def ratio(self) -> Float64:
        """d1 / d2; an exact copy has 0."""
        return self.d1 / np.maximum(self.d2, 1e-12)


def _pixels(images: Tensor) -> Float64:
    """uint8 [N,3,R,R] as float64 [N, 3 * 32 * 32] box means at 32 px, scaled so that distances are RMS."""
    small = F.adaptive_avg_pool2d(images.double(), min(RESOLUTION, images.shape[-1])).flatten(1)
    pixels: Float64 = (small / small.shape[1] ** 0.5).numpy()
    return pixels


def nearest(samples: Tensor, train: Tensor, bases: Sequence[str]) -> Neighbours:
    """Nearest training images and bases of uint8 samples [N,3,R,R] in uint8 train [M,3,R,R]."""
    pixels = _pixels(samples)
    apart = np.minimum(distances(pixels, _pixels(train)), distances(pixels, _pixels(train.flip(-1))))
    (unit,), num_units = number_units(bases)
    by_base = np.full((num_units, len(samples)), np.inf)
    np.minimum.at(by_base, unit, apart.T)
    two = np.partition(by_base, 1, axis=0)[:2] if num_units > 1 else np.vstack([by_base, by_base])
    return Neighbours(apart.argmin(1).astype(np.int64), two[0], two[1])


def copies(neighbours: Neighbours) -> Metric:
    """Share of samples that are copies."""
    n = len(neighbours.row)
    if not enough("copies", n):
        return Metric.refused("copies", n)
    return Metric(float((neighbours.ratio < COPY_RATIO).mean()), n)


def copying_score(samples: Neighbours, held_out: Neighbours) -> Metric:
    """C_T without cells: z-score of the Mann-Whitney test on distances to the training set.

    Below -3, samples lie closer to the training set than held-out real pictures do; blurry ones do as well,
    since a blurred picture is nearer to everything."""
    from scipy.stats import rankdata

    n, m = len(samples.d1), len(held_out.d1)
    if not enough("kid", n, m):
        return Metric.refused("kid", min(n, m))
    ranks = rankdata(np.concatenate([samples.d1, held_out.d1]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    return Metric(float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)), min(n, m))
