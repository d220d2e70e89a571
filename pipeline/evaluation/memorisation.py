"""Which samples copy a training image.

A sample is a copy if its nearest training family is less than a third as far as the second nearest (arXiv
2505.16959), in pixels at 32 px, mirrored images included. No detector is reliable (arXiv 2306.04675), so the
report also shows the nearest images. The data-copying test C_T (arXiv 2004.05675) asks, for the whole set,
whether samples lie closer to the training set than other real images do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.metrics import Float64, Metric, distances, enough
from pipeline.evaluation.statistics import Int64, number_families

COPY_RATIO = 1 / 3
RESOLUTION = 32


@dataclass(frozen=True)
class Neighbours:
    """For each of n samples: the nearest training image, its distance, and the distance of the second family."""

    row: Int64  # of the training images
    d1: Float64  # RMS difference per pixel and channel, grey levels 0..255
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


def nearest(samples: Tensor, train: Tensor, families: Sequence[str]) -> Neighbours:
    """Nearest of uint8 training images [M,3,R,R], with their families [M], for uint8 samples [N,3,R,R]."""
    pixels = _pixels(samples)
    between = np.minimum(distances(pixels, _pixels(train)), distances(pixels, _pixels(train.flip(-1))))
    (family,), num_families = number_families(families)
    by_family = np.full((num_families, len(samples)), np.inf)
    np.minimum.at(by_family, family, between.T)
    two = np.partition(by_family, 1, axis=0)[:2] if num_families > 1 else np.vstack([by_family, by_family])
    return Neighbours(between.argmin(1).astype(np.int64), two[0], two[1])


def copies(neighbours: Neighbours) -> Metric:
    """Fraction of samples that are copies."""
    n = len(neighbours.row)
    if not enough("copies", n):
        return Metric.refused("copies", n)
    return Metric(float((neighbours.ratio < COPY_RATIO).mean()), n)


def copying_score(samples: Neighbours, held_out: Neighbours) -> Metric:
    """C_T without cells: z-score of the Mann-Whitney test on distances to the training set, without correction
    for ties.

    Below -3, samples lie closer to the training set than held-out real images do. Blurry samples do so, too, since
    a blurred image is nearer to everything."""
    from scipy.stats import mannwhitneyu

    n, m = len(samples.d1), len(held_out.d1)
    if not enough("kid", n, m):
        return Metric.refused("kid", min(n, m))
    u = mannwhitneyu(samples.d1, held_out.d1, method="asymptotic").statistic
    return Metric(float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)), min(n, m))
