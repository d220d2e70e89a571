"""How sure a number is: bootstrap intervals and noise floors.

What is resampled is the family (an emoji with all its variants, and all samples of their captions), since
images of one family are alike. The kernel matrices are summed by family once; then a bootstrap of KID is a few
products of small matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Float64, Metric, cubic_kernel, enough

Int64 = NDArray[np.int64]
BOOTSTRAPS = 1000
SPLITS = 200


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A numpy generator keyed by what it is for."""
    return np.random.default_rng([seed, *purpose.encode()])


def spaced(count: int, limit: int) -> Int64:
    """At most `limit` evenly spaced numbers below `count`, ascending."""
    kept = min(count, limit)
    numbers: Int64 = np.arange(kept) * count // max(kept, 1)
    return numbers


def resample_counts(num_families: int, rng: np.random.Generator, times: int = BOOTSTRAPS) -> Float64:
    """How often each family is drawn in each bootstrap: float64 [times, num_families]."""
    counts = rng.multinomial(num_families, np.full(num_families, 1 / num_families), size=times)
    return counts.astype(np.float64)


class KernelSums:
    """Kernel and pair sums between two sets of features, by family. Pairs within one family are left out.

    Such pairs (an image with itself, two samples of one caption, a sample with the real image of its caption)
    are not independent draws; counted, they would bias KID by the number of samples per caption."""

    def __init__(self, x: Float64, family_x: Int64, y: Float64, family_y: Int64, num_families: int) -> None:
        member_x, member_y = _one_hot(family_x, num_families), _one_hot(family_y, num_families)
        self.kernel = member_x.T @ cubic_kernel(x, y) @ member_y  # [F, F]
        self.pairs = np.outer(member_x.sum(0), member_y.sum(0))
        np.fill_diagonal(self.kernel, 0)
        np.fill_diagonal(self.pairs, 0)

    def mean(self, counts: Float64) -> Float64:
        """Mean kernel if family f is counted counts[:,f] times, for counts [B,F]: [B]."""
        total = ((counts @ self.kernel) * counts).sum(1)
        mean: Float64 = total / np.maximum(((counts @ self.pairs) * counts).sum(1), 1e-12)
        return mean


def _one_hot(family: Int64, num_families: int) -> Float64:
    return np.eye(num_families)[family]


def kid_by_family(
    real: Float64, family_real: Int64, fake: Float64, family_fake: Int64, counts: Float64
) -> Float64:
    """KID over pairs of different families, for each row of `counts` [B,F]: [B].

    Families of both sets are numbered together (see number_families). With a row of ones, and one image in each
    family, it equals `metrics.kid`."""
    num_families = counts.shape[1]
    within_real = KernelSums(real, family_real, real, family_real, num_families).mean(counts)
    within_fake = KernelSums(fake, family_fake, fake, family_fake, num_families).mean(counts)
    between = KernelSums(real, family_real, fake, family_fake, num_families).mean(counts)
    return within_real + within_fake - 2 * between


def interval(values: Float64) -> tuple[float, float]:
    """Central 95% of `values`."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def number_families(*groups: Sequence[str]) -> tuple[list[Int64], int]:
    """Number the families of several sets together: one int64 array per set, and the number of families."""
    names = {name: i for i, name in enumerate(sorted({name for group in groups for name in group}))}
    return [np.array([names[name] for name in group], dtype=np.int64) for group in groups], len(names)


@dataclass(frozen=True)
class KidSamples:
    """KID of two sets with its bootstraps."""

    value: float
    bootstraps: Float64  # [B]
    n: int

    @classmethod
    def measure(
        cls, real: Float64, family_real: Int64, fake: Float64, family_fake: Int64, counts: Float64
    ) -> KidSamples:
        """See kid_by_family; `n` is the number of images in the smaller set."""
        with_all = np.concatenate([np.ones((1, counts.shape[1])), counts])
        values = kid_by_family(real, family_real, fake, family_fake, with_all)
        return cls(float(values[0]), values[1:], min(len(real), len(fake)))

    @property
    def metric(self) -> Metric:
        """KID with its 95% interval, or the reason why there are too few images."""
        if not enough("kid", self.n):
            return Metric.refused("kid", self.n)
        return Metric(self.value, self.n, *interval(self.bootstraps))


# --- Noise floors: by how much two sets of real images differ.


def kid_of_halves(
    real: Float64, families: Sequence[str], size: int, rng: np.random.Generator, splits: int = SPLITS
) -> Metric:
    """KID of two disjoint random parts of one real set, each of about `size` images (at most half the set).

    Families stay together. The value is the mean over splits (0 in expectation), the interval holds 95% of them:
    by how much two real sets of that size differ."""
    (family,), num_families = number_families(families)
    first, second = np.zeros((2, splits, len(real)))
    for i in range(splits):
        in_first = rng.permutation(num_families)[family] < num_families // 2
        order = rng.permutation(len(real))
        first[i, order[in_first[order]][:size]] = 1
        second[i, order[~in_first[order]][:size]] = 1
    n = int(min(first.sum(1).min(), second.sum(1).min()))
    if not enough("kid", n):
        return Metric.refused("kid", n)
    pairs = (family[:, None] != family[None]).astype(np.float64)
    kernel = cubic_kernel(real, real) * pairs

    def mean(a: Float64, b: Float64) -> Float64:
        total: Float64 = ((a @ kernel) * b).sum(1) / ((a @ pairs) * b).sum(1)
        return total

    values = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    return Metric(float(values.mean()), n, *interval(values))
