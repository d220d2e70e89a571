"""Distances between two sets of images, on features or pixels, in float64.

KID: unbiased squared maximum mean discrepancy (Binkowski et al., arXiv 1801.01401). FD: Frechet distance
(arXiv 1706.08500), by eigenvalues. Precision and recall: Kynkaanniemi et al. (arXiv 1904.06991); density and
coverage: Naeem et al. (arXiv 2002.09797), clipped: Salvy et al. (arXiv 2507.01761). Sharpness is something to
match, not to maximise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adversarial.losses import kernel_distance
from pipeline.models.shape import Images, by_size

Float64 = NDArray[np.float64]

CHUNK = 16  # images whose pixels are in float64 at once

# Minimum number of images, in the smaller of the two sets, for a number to mean something.
NEEDS: Mapping[str, int] = {
    "kid": 50,
    "fd": 200,
    "precision": 50,
    "recall": 50,
    "density": 50,
    "coverage": 50,
    "clipped_density": 50,
    "clipped_coverage": 50,
    "sliced_w2": 50,
    "sharpness": 20,
    "copies": 50,
    "retrieval": 20,
}
MIN_FAMILIES = 20  # of captions, and of real images, for an interval from resampling them


@dataclass(frozen=True)
class Metric:
    """A number with its sample count and perhaps its 95% interval; or the reason why one of them is missing."""

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    families: int | None = None  # of captions, behind the interval

    @classmethod
    def refused(cls, name: str, n: int) -> Metric:
        """Without a value: there are too few images, as in `fd: n=14, needs 200`."""
        return cls(None, n, reason=f"{name}: n={n}, needs {NEEDS[name]}")

    @classmethod
    def without_interval(cls, name: str, value: float, n: int, families: int) -> Metric:
        """A value alone: there are too few families, as in `kid: 7 families, an interval needs 20`."""
        reason = f"{name}: {families} families, an interval needs {MIN_FAMILIES}"
        return cls(value, n, reason=reason, families=families)

    def as_json(self) -> dict[str, Any]:
        """JSON values of six significant digits; `value` is null where the metric was refused."""
        out: dict[str, Any] = {"value": rounded(self.value), "n": self.n}
        if self.low is not None and self.high is not None:
            out |= {"low": rounded(self.low), "high": rounded(self.high)}
        if self.reason:
            out["reason"] = self.reason
        if self.families is not None:
            out["families"] = self.families
        return out


def rounded(value: float | None) -> float | None:
    """`value` with six significant digits; None for None and for values that are not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def enough(name: str, *counts: int) -> bool:
    """Whether every set is large enough for the metric `name`."""
    return min(counts) >= NEEDS[name]


# --- On features.


def cubic_kernel(x: Float64, y: Float64) -> Float64:
    """(x.y / d + 1)^3 between rows of x [n,d] and y [m,d]: [n,m]."""
    kernel: Float64 = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def kid(real: Float64, fake: Float64) -> float:
    """Kernel distance between features [n,d] and [m,d]: unbiased, so it may fall below 0."""
    return float(kernel_distance(torch.from_numpy(real), torch.from_numpy(fake)))


def frechet_distance(real: Float64, fake: Float64) -> float:
    """Frechet distance between Gaussians fitted to features [n,d] and [m,d].

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2); the trace of the root is the sum of the root eigenvalues of
    S1^1/2 S2 S1^1/2, which is symmetric, so no matrix square root of a product is needed."""
    mean = real.mean(0) - fake.mean(0)
    s1, s2 = np.atleast_2d(np.cov(real, rowvar=False)), np.atleast_2d(np.cov(fake, rowvar=False))
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ s2 @ root)
    trace = np.trace(s1) + np.trace(s2) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return max(float(mean @ mean + trace), 0.0)


def distances(x: Float64, y: Float64) -> Float64:
    """Euclidean distances between rows of x [n,d] and y [m,d]: [n,m]."""
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * (x @ y.T)
    between: Float64 = np.sqrt(np.maximum(squared, 0))
    return between


def prdc(real: Float64, fake: Float64, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage by k nearest neighbours, between features [n,d] and [m,d].

    recall grows with m, so compare models at equal m."""
    return prdc_of_distances(distances(real, real), distances(fake, fake), distances(real, fake), k)


def prdc_of_distances(
    within_real: Float64, within_fake: Float64, between: Float64, k: int = 5
) -> dict[str, float]:
    """`prdc` from the distances within the sets [n,n] and [m,m] and between them [n,m]."""
    radius_real = neighbour_radius(within_real, k)  # [n]
    radius_fake = neighbour_radius(within_fake, k)  # [m]
    inside_real = between < radius_real[:, None]
    return {
        "precision": float(inside_real.any(0).mean()),
        "recall": float((between < radius_fake[None]).any(1).mean()),
        "density": float(inside_real.sum(0).mean() / k),
        "coverage": float((between.min(1) < radius_real).mean()),
    }


def clipped_density_coverage(real: Float64, fake: Float64, k: int = 5) -> dict[str, float]:
    """Clipped density and coverage (arXiv 2507.01761) between features [n,d] and [m,d], n > k.

    Either is the equivalent fraction of good samples: 1 for real images, 1 - p if a fraction p is far from all.
    Density clips the radii of the real balls at their median, so that outliers hold nothing, and what a sample adds
    at 1; it is calibrated by the real set's own. Coverage counts up to k samples in each ball; it is calibrated by
    the number of real samples that would be expected to cover as much."""
    between = distances(real, fake)  # [n, m]
    own = distances(real, real)
    radius = neighbour_radius(own, k)  # [n]
    small = np.minimum(radius, np.median(radius))
    np.fill_diagonal(own, np.inf)

    def density(balls: Float64) -> float:
        return float(np.minimum((balls <= small[:, None]).sum(0) / k, 1).mean())

    covered = np.minimum((between < radius[:, None]).sum(1), k).mean() / k
    expected = _expected_coverage(len(real), len(fake), k)
    return {
        "clipped_density": min(density(between) / density(own), 1.0),
        "clipped_coverage": float(np.interp(covered, expected, np.linspace(0, 1, len(fake) + 1))),
    }


def _expected_coverage(n: int, m: int, k: int) -> Float64:
    """Mean of min(samples in a ball, k) / k if 0 to m of the samples follow the law of the n real ones: [m + 1].

    The ball of a real sample to its k-th neighbour holds a fraction of the law that is Beta(k, n - k) distributed,
    whatever the law, so that the number of samples in it is beta-binomial."""
    good = np.arange(m + 1)[:, None]
    missing = (k - np.arange(k)) * scipy.stats.betabinom.pmf(np.arange(k), good, k, n - k)
    expected: Float64 = 1 - missing.sum(1) / k
    return expected


def sliced_wasserstein(real: Float64, fake: Float64, num_projections: int = 512) -> float:
    """Squared Wasserstein-2 distance of projections of features [n,d] and [m,d] on random lines: mean, times d.

    MIND (arXiv 2605.06797) averages such distances of Inception features. The scale and the number of projections
    are our own: a shift by v gives |v|^2, as it does in the Frechet distance. Directions are the same in each call.
    Biased upwards by some 3 d (1/n + 1/m) on whitened features, so compare models at equal n and m."""
    dim = real.shape[1]
    directions = np.random.Generator(np.random.PCG64(0)).standard_normal((dim, num_projections))
    directions /= np.linalg.norm(directions, axis=0)
    x, y = np.sort(real @ directions, 0), np.sort(fake @ directions, 0)  # [n, p], [m, p]
    # Between these levels both quantile functions are constant.
    levels = np.union1d(np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y))
    middle, width = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    gaps = x[(middle * len(x)).astype(int)] - y[(middle * len(y)).astype(int)]
    return float(dim * (width @ gaps**2).mean())


def describe_reference(features: Float64) -> dict[str, float]:
    """How much room a set of features [n,d] fills, n >= 2; before whitening, which makes all directions equal.

    `effective_rank`: exponential of the entropy of the covariance's eigenvalues, as fractions of their sum (Roy
    and Vetterli, 2007). `nearest_median` and `pairwise_median`: median distance to the nearest other sample, and to
    any; where the two are alike, neighbourhoods (precision, recall, coverage) hold little information."""
    n, dim = features.shape
    eigenvalues = np.maximum(np.linalg.eigvalsh(np.atleast_2d(np.cov(features, rowvar=False))), 0)
    fractions = eigenvalues[eigenvalues > 0] / eigenvalues.sum() if eigenvalues.any() else np.ones(1)
    within = distances(features, features)
    pairs = within[np.triu_indices(n, 1)]
    return {
        "n": n,
        "dim": dim,
        "effective_rank": float(np.exp(-(fractions * np.log(fractions)).sum())),
        "nearest_median": float(np.median(neighbour_radius(within, 1))),
        "pairwise_median": float(np.median(pairs)),
    }


def neighbour_radius(within: Float64, k: int) -> Float64:
    """Distance of each row to its k-th nearest other one, from the distances [n,n] of all."""
    radius: Float64 = np.partition(within, k, axis=1)[:, k]  # the nearest is the row itself, at 0
    return radius


# --- On pixels.


@dataclass(frozen=True)
class Sharpness:
    """How sharp each image of a set is, in grey levels 0..255.

    top_octave: power of luminance in the upper half of the radial frequencies, [n];
    laplacian: variance of the 5-point Laplacian, [n]; gradient: 1024 quantiles of the gradient magnitude.
    """

    top_octave: Float64
    laplacian: Float64
    gradient: Float64


def sharpness(images: Images) -> Sharpness:
    """Measure uint8 images, few at a time: only the gradient magnitudes are kept of all."""
    laplacian, sizes = np.zeros(len(images)), []
    for places, alike in by_size(images):
        parts = [_laplacian_and_gradients(luminance(chunk)) for chunk in alike.split(CHUNK)]
        laplacian[places], gradients = (np.concatenate(each) for each in zip(*parts, strict=True))
        sizes.append(gradients)
    quantiles = np.quantile(np.concatenate(sizes), (np.arange(1024) + 0.5) / 1024)
    return Sharpness(top_octave(images), laplacian, quantiles)


def top_octave(images: Images) -> Float64:
    """`Sharpness.top_octave` of uint8 images."""
    power = np.zeros(len(images))
    for places, alike in by_size(images):
        power[places] = np.concatenate([_top_octave(luminance(chunk)) for chunk in alike.split(CHUNK)])
    return power


def luminance(images: Tensor) -> Tensor:
    """Of uint8 images [n,3,H,W]: float64 [n,H,W]."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return torch.einsum("nchw,c->nhw", images.double(), weights)


def _top_octave(grey: Tensor) -> Float64:
    power = torch.fft.fft2(grey, norm="ortho").abs().square()
    y, x = (torch.fft.fftfreq(side, dtype=torch.float64) for side in grey.shape[1:])
    radius = (y[:, None] ** 2 + x[None] ** 2).sqrt()  # cycles per pixel
    found: Float64 = power[:, (radius >= 0.25) & (radius < 0.5)].mean(1).numpy()
    return found


def _laplacian_and_gradients(grey: Tensor) -> tuple[Float64, Float64]:
    """`laplacian` [n] of luminance [n,H,W], and all gradient magnitudes [n (H-2) (W-2)]."""
    inner = grey[:, 1:-1, 1:-1]
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    laplacian = neighbours - 4 * inner
    dx = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]) / 2
    dy = (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]) / 2
    return laplacian.var((1, 2)).numpy(), (dx**2 + dy**2).sqrt().flatten().numpy()


def log_power_gap(real: Float64, fake: Float64) -> float:
    """Log ratio of mean top-octave power, fake to real: 0 is equally sharp, negative is blurrier."""
    return float(np.log((fake.mean() + 1e-12) / (real.mean() + 1e-12)))


def compare_sharpness(real: Sharpness, fake: Sharpness) -> dict[str, float]:
    """`top_octave` (see log_power_gap), `laplacian` (ratio of mean variance, 1 = equally sharp) and
    `gradient` (Wasserstein-1 distance between gradient magnitudes, grey levels)."""
    return {
        "top_octave": log_power_gap(real.top_octave, fake.top_octave),
        "laplacian": float(fake.laplacian.mean() / (real.laplacian.mean() + 1e-12)),
        "gradient": float(np.abs(real.gradient - fake.gradient).mean()),
    }
