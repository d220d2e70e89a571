"""How sure a number is: bootstrap intervals and noise floors.

The unit that is resampled is the base picture (an emoji with all its variants, in all its samples), since
pictures of one base are alike. The kernel matrices are summed by base once; then a bootstrap of KID is a few
products of small matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Float64, Metric, cubic_kernel, enough, log_power_gap

Int64 = NDArray[np.int64]
BOOTSTRAPS = 1000
SPLITS = 200


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A numpy generator keyed by what it is for."""
    return np.random.default_rng([seed, *purpose.encode()])


def resample_counts(num_units: int, rng: np.random.Generator, times: int = BOOTSTRAPS) -> Float64:
    """How often each unit is drawn in each bootstrap: float64 [times, num_units]."""
    counts = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=times)
    return counts.astype(np.float64)


class KernelSums:
    """Kernel and pair sums between two sets of features, by unit. Pairs within one unit are left out.

    Such pairs (an image with itself, two samples of one caption, a sample with the real picture of its
    caption) are no independent draws; counted, they would bias KID by how many samples a caption has."""

    def __init__(self, x: Float64, unit_x: Int64, y: Float64, unit_y: Int64, num_units: int) -> None:
        member_x, member_y = _one_hot(unit_x, num_units), _one_hot(unit_y, num_units)
        self.kernel = member_x.T @ cubic_kernel(x, y) @ member_y  # [U, U]
        self.pairs = np.outer(member_x.sum(0), member_y.sum(0))
        np.fill_diagonal(self.kernel, 0)
        np.fill_diagonal(self.pairs, 0)

    def mean(self, counts: Float64) -> Float64:
        """Mean kernel if unit u is counted counts[:,u] times, for counts [B,U]: [B]."""
        total = ((counts @ self.kernel) * counts).sum(1)
        mean: Float64 = total / np.maximum(((counts @ self.pairs) * counts).sum(1), 1e-12)
        return mean


def _one_hot(unit: Int64, num_units: int) -> Float64:
    return np.eye(num_units)[unit]


def kid_by_unit(real: Float64, unit_real: Int64, fake: Float64, unit_fake: Int64, counts: Float64) -> Float64:
    """KID over pairs of different units, for each row of `counts` [B,U]: [B].

    Units number the bases of both sets alike. With a row of ones, and no unit given twice, it is `kid`."""
    U = counts.shape[1]
    within_real = KernelSums(real, unit_real, real, unit_real, U).mean(counts)
    within_fake = KernelSums(fake, unit_fake, fake, unit_fake, U).mean(counts)
    return within_real + within_fake - 2 * KernelSums(real, unit_real, fake, unit_fake, U).mean(counts)


def interval(values: Float64) -> tuple[float, float]:
    """Central 95% of `values`."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def number_units(*groups: Sequence[str]) -> tuple[list[Int64], int]:
    """Number the bases of several sets alike: one int64 array a set, and how many bases there are."""
    names = {name: i for i, name in enumerate(sorted({name for group in groups for name in group}))}
    return [np.array([names[name] for name in group], dtype=np.int64) for group in groups], len(names)


@dataclass(frozen=True)
class KidSamples:
    """KID of two sets and its bootstraps; those of two models with one `counts` are paired."""

    value: float
    bootstraps: Float64  # [B]
    n: int

    @classmethod
    def measure(
        cls, real: Float64, unit_real: Int64, fake: Float64, unit_fake: Int64, counts: Float64
    ) -> KidSamples:
        """See kid_by_unit; `n` is the number of images in the smaller set."""
        with_all = np.concatenate([np.ones((1, counts.shape[1])), counts])
        values = kid_by_unit(real, unit_real, fake, unit_fake, with_all)
        return cls(float(values[0]), values[1:], min(len(real), len(fake)))

    @property
    def metric(self) -> Metric:
        """KID with its 95% interval, or its refusal."""
        if not enough("kid", self.n):
            return Metric.refused("kid", self.n)
        return Metric(self.value, self.n, *interval(self.bootstraps))

    def minus(self, other: KidSamples) -> Metric:
        """The difference to another model's on the same resamples, with its 95% interval."""
        n = min(self.n, other.n)
        if not enough("kid", n):
            return Metric.refused("kid", n)
        return Metric(self.value - other.value, n, *interval(self.bootstraps - other.bootstraps))


# --- Noise floors: what two sets of real images already differ by.


def kid_between(
    a: Float64, bases_a: Sequence[str], b: Float64, bases_b: Sequence[str], rng: np.random.Generator
) -> Metric:
    """KID of two real sets with no base in common, such as train and test, with its bootstrap interval."""
    (unit_a, unit_b), num_units = number_units(bases_a, bases_b)
    return KidSamples.measure(a, unit_a, b, unit_b, resample_counts(num_units, rng)).metric


def kid_of_halves(
    real: Float64, bases: Sequence[str], size: int, rng: np.random.Generator, splits: int = SPLITS
) -> Metric:
    """KID of two disjoint random parts of one real set, each of about `size` images (half the set, if less).

    Bases are not torn apart. The value is the mean over splits (0 in expectation), the interval holds 95% of
    them: what two real sets of that size differ by."""
    (unit,), num_units = number_units(bases)
    first, second = np.zeros((2, splits, len(real)))
    for i in range(splits):
        in_first = rng.permutation(num_units)[unit] < num_units // 2
        order = rng.permutation(len(real))
        first[i, order[in_first[order]][:size]] = 1
        second[i, order[~in_first[order]][:size]] = 1
    n = int(min(first.sum(1).min(), second.sum(1).min()))
    if not enough("kid", n):
        return Metric.refused("kid", n)
    pairs = (unit[:, None] != unit[None]).astype(np.float64)
    kernel = cubic_kernel(real, real) * pairs

    def mean(a: Float64, b: Float64) -> Float64:
        total: Float64 = ((a @ kernel) * b).sum(1) / ((a @ pairs) * b).sum(1)
        return total

    values = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    return Metric(float(values.mean()), n, *interval(values))


def sharpness_of_halves(power: Float64, size: int, rng: np.random.Generator, splits: int = 1000) -> Metric:
    """|log ratio of top-octave power| that 95% of pairs of real sets of `size` images stay below."""
    size = min(size, len(power) // 2)
    if not enough("sharpness", size):
        return Metric.refused("sharpness", size)
    orders = (rng.permutation(len(power)) for _ in range(splits))
    gaps = [abs(log_power_gap(power[o[:size]], power[o[size : 2 * size]])) for o in orders]
    return Metric(float(np.quantile(gaps, 0.95)), size)
