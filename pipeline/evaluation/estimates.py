"""Numbers with 95% intervals, from evidence: of one contender, or of the difference of two.

Families of captions are resampled, since images of one family are alike. Differences are paired: both
contenders drew the same captions with the same seeds. Means and kernel distances are bootstrapped. Precision,
recall, density and coverage, which a bootstrap's repeated images would bias, are measured on random halves of the
families (delete-half jackknife; leaving out single families or small groups is twice too wide for them).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.evidence import Conditions, Evidence, Measured
from pipeline.evaluation.memorisation import ALIKE, REPLICA_DISTANCE, REPLICA_QUANTILE
from pipeline.evaluation.metrics import MIN_FAMILIES, Float64, Metric, distances, enough, prdc_of_distances
from pipeline.evaluation.statistics import Int64, KernelSums, generator, interval, resample_counts

HALVES = 100
MAX_NEIGHBOURS = 1000  # real images that neighbourhoods are measured among
K = 5  # neighbours
NEIGHBOURHOOD = ("precision", "recall", "density", "coverage")
Mask = NDArray[np.bool_]


class Estimates:
    """All numbers of one caption set; what several of them need is computed once."""

    def __init__(self, evidence: Evidence, split: str) -> None:
        self.evidence = evidence
        self.split = split
        self.conditions: Conditions = evidence.conditions[split]
        self.measured: Mapping[str, Measured] = evidence.measured[split]
        self.families = len(np.unique(self.conditions.families))
        # Of this object, and gone with it.
        self.kid_values = functools.cache(self._kid_values)
        self.neighbourhood_values = functools.cache(self._neighbourhood_values)
        self._within_real = functools.cache(self._compute_within_real)
        self._real_distances = functools.cache(self._compute_real_distances)

    @property
    def one_of_each(self) -> bool:
        """Whether all images are of different families, so that more images would show more of them."""
        return self.families == len(self.conditions.families)

    @functools.cached_property
    def counts(self) -> Float64:
        """How often each family counts: a row of ones, then the bootstraps [1 + B, F]."""
        num_families = self.conditions.num_families
        rng = generator(self.evidence.description.seed, f"bootstrap/{self.split}")
        return np.concatenate([np.ones((1, num_families)), resample_counts(num_families, rng)])

    # --- KID.

    def _compute_within_real(self, extractor: str) -> Float64:
        real, families = self.conditions.real[extractor], self.conditions.real_families
        return KernelSums(real, families, real, families, self.conditions.num_families).mean(self.counts)

    def _kid_values(self, name: str, extractor: str) -> Float64:
        """KID of a contender for each row of `counts`: [1 + B]."""
        real, unit_real = self.conditions.real[extractor], self.conditions.real_families
        fake, unit_fake = self.measured[name].features[extractor], self.conditions.families
        total = self.conditions.num_families
        within = KernelSums(fake, unit_fake, fake, unit_fake, total).mean(self.counts)
        between = KernelSums(real, unit_real, fake, unit_fake, total).mean(self.counts)
        return self._within_real(extractor) + within - 2 * between

    def kid(self, name: str, extractor: str) -> Metric:
        """KID of a contender."""
        return self._metric("kid", self.kid_values(name, extractor), self.conditions.real_families)

    def kid_difference(self, name: str, other: str, extractor: str) -> Metric:
        """KID of a contender minus that of another: below 0 is better.

        Where both are as good as real images, the interval is about twice too wide, and decides less often: there
        KID is a degenerate U-statistic, whose plain bootstrap is not consistent (Arcones and Gine, 1992)."""
        values = self.kid_values(name, extractor) - self.kid_values(other, extractor)
        return self._metric("kid", values, self.conditions.real_families)

    # --- Means over images.

    def _means(self, values: Float64) -> Float64:
        """Means of values [N] for each row of `counts`: [1 + B]."""
        total = self.conditions.num_families
        sums = np.bincount(self.conditions.families, values, total)
        sizes = np.bincount(self.conditions.families, minlength=total)
        means: Float64 = self.counts @ sums / np.maximum(self.counts @ sizes, 1e-12)
        return means

    def top_octave(self, name: str) -> Metric:
        """Log ratio of mean top-octave power to the real images of the same captions; negative is blurrier."""
        return self._metric("sharpness", self._gap(name))

    def _gap(self, name: str) -> Float64:
        power, real = self._means(self.measured[name].power), self._means(self.conditions.power)
        return np.log((power + 1e-12) / (real + 1e-12))

    def sharpness_excess(self, name: str, other: str) -> Metric:
        """How much further from the real images' power than another contender, in log power: above 0 is
        worse."""
        return self._metric("sharpness", np.abs(self._gap(name)) - np.abs(self._gap(other)))

    def caption_rank(self, name: str) -> Metric:
        """Mean rank of the true caption (retrieval.caption_rank)."""
        return self._metric("retrieval", self._means(self._ranks(name)))

    def retrieved(self, name: str) -> Metric:
        """Share of images whose caption ranks first."""
        return self._metric("retrieval", self._means((self._ranks(name) > 1 - 1e-6).astype(np.float64)))

    def caption_difference(self, name: str, other: str) -> Metric:
        """Mean rank of the true caption minus that of another contender: below 0 is worse."""
        return self._metric("retrieval", self._means(self._ranks(name) - self._ranks(other)))

    def _ranks(self, name: str) -> Float64:
        ranks = self.measured[name].caption_rank
        assert ranks is not None, "see `judges_captions`"
        return ranks

    @property
    def judges_captions(self) -> bool:
        """Whether ranks of captions are known."""
        return all(each.caption_rank is not None for each in self.measured.values())

    def alike(self, name: str) -> Metric:
        """Share of images much nearer to one training family than to all others (memorisation.ALIKE)."""
        return self._metric("copies", self._means((self.measured[name].rho < ALIKE).astype(np.float64)))

    def replicas(self, name: str) -> Metric:
        """Share of images that are almost equal to a training image: rho below the reference's 1% quantile, and
        nearer than memorisation.REPLICA_DISTANCE."""
        measured = self.measured[name]
        limit = np.quantile(self.evidence.reference.rho, REPLICA_QUANTILE)
        almost = (measured.rho < limit) & (measured.distance < REPLICA_DISTANCE)
        return self._metric("copies", self._means(almost.astype(np.float64)))

    def _metric(self, kind: str, values: Float64, *others: Int64) -> Metric:
        """The first of `values` with the interval of the rest. `others`: families of the images [M] that are
        resampled, too."""
        sets = (self.conditions.families, *others)
        n, families = min(map(len, sets)), min(len(np.unique(each)) for each in sets)
        if not enough(kind, n):
            return Metric.refused(kind, n)
        if families < MIN_FAMILIES:
            return Metric.without_interval(kind, float(values[0]), n, families)
        return Metric(float(values[0]), n, *interval(values[1:]), families=self.families)

    # --- Neighbourhoods.

    @functools.cached_property
    def _kept(self) -> tuple[Int64, Int64]:
        """One real image and one drawn image of each family, since the nearest neighbours of an image are its
        variants; at most MAX_NEIGHBOURS of either."""
        rng = generator(self.evidence.description.seed, f"neighbours/{self.split}")
        kept = []
        for families in (self.conditions.real_families, self.conditions.families):
            first = np.unique(families, return_index=True)[1]
            if len(first) > MAX_NEIGHBOURS:
                first = rng.choice(first, MAX_NEIGHBOURS, replace=False)
            kept.append(np.sort(first))
        return kept[0], kept[1]

    @functools.cached_property
    def _halves(self) -> list[Mask]:
        """Families that are kept [F]: all, then random halves."""
        total = self.conditions.num_families
        rng = generator(self.evidence.description.seed, f"halves/{self.split}")
        return [np.ones(total, bool), *(rng.permutation(total) < total // 2 for _ in range(HALVES))]

    def _compute_real_distances(self, extractor: str) -> Float64:
        real = self.conditions.real[extractor][self._kept[0]]
        return distances(real, real)

    def _neighbourhood_values(self, name: str, extractor: str) -> Float64:
        """NEIGHBOURHOOD of a contender [1 + H, 4], of all families and of each half of them."""
        of_real, of_fake = self._kept
        families_real, families_fake = (
            self.conditions.real_families[of_real],
            self.conditions.families[of_fake],
        )
        real, fake = self.one_per_family(name, extractor)
        within_real, within_fake = self._real_distances(extractor), distances(fake, fake)
        between = distances(real, fake)
        rows = []
        for kept in self._halves:
            r, f = np.flatnonzero(kept[families_real]), np.flatnonzero(kept[families_fake])
            found = prdc_of_distances(
                within_real[np.ix_(r, r)], within_fake[np.ix_(f, f)], between[np.ix_(r, f)], K
            )
            rows.append([found[key] for key in NEIGHBOURHOOD])
        return np.array(rows)

    def one_per_family(self, name: str, extractor: str) -> tuple[Float64, Float64]:
        """Features of one real image and of one image of a contender of each family."""
        of_real, of_fake = self._kept
        return self.conditions.real[extractor][of_real], self.measured[name].features[extractor][of_fake]

    @property
    def num_neighbours(self) -> int:
        """Images in the smaller of the two sets of neighbourhoods."""
        return min(map(len, self._kept))

    def neighbourhood(self, name: str, extractor: str) -> dict[str, Metric]:
        """Precision, recall, density and coverage of a contender."""
        if not enough("recall", self.num_neighbours):
            return {key: Metric.refused(key, self.num_neighbours) for key in NEIGHBOURHOOD}
        values = self.neighbourhood_values(name, extractor)
        metrics = {key: self._jackknifed(values[:, i]) for i, key in enumerate(NEIGHBOURHOOD)}
        return {key: metric if key == "density" else _within_one(metric) for key, metric in metrics.items()}

    def neighbourhood_difference(self, key: str, name: str, other: str, extractor: str) -> Metric:
        """One of NEIGHBOURHOOD of a contender minus another's: below 0 is worse."""
        if not enough(key, self.num_neighbours):
            return Metric.refused(key, self.num_neighbours)
        i = NEIGHBOURHOOD.index(key)
        mine, theirs = (self.neighbourhood_values(each, extractor)[:, i] for each in (name, other))
        return self._jackknifed(mine - theirs)

    def _jackknifed(self, values: Float64) -> Metric:
        """With the interval of a delete-half jackknife: the variance over halves of the families is that of the
        whole (Shao & Wu 1989), and a little more for neighbourhoods, which are wider in a half."""
        whole, n = float(values[0]), self.num_neighbours
        reach = float(1.96 * values[1:].std())
        return Metric(whole, n, whole - reach, whole + reach, families=n)


def estimates_of(evidence: Evidence) -> dict[str, Estimates]:
    """Those of each caption set."""
    return {split: Estimates(evidence, split) for split in evidence.conditions}


def _within_one(share: Metric) -> Metric:
    """A share, with its interval cut to 0..1."""
    assert share.low is not None and share.high is not None
    return replace(share, low=max(share.low, 0.0), high=min(share.high, 1.0))


# --- Copies.


@dataclass(frozen=True)
class CopyExcess:
    """How much more often samples are ALIKE one family than real training images of the same groups."""

    share: float  # of samples
    floor: float  # of the reference, weighted
    excess: Metric
    z: float  # rank test, stratified by group: below 0, samples have smaller rho


def copy_excess(estimates: Estimates, name: str) -> CopyExcess:
    """Compare the rho of a contender's images with the reference; both sides are resampled by family."""
    evidence, conditions = estimates.evidence, estimates.conditions
    reference = evidence.reference
    rho = estimates.measured[name].rho
    weights = _group_weights(conditions.groups, reference.groups)
    rng = generator(evidence.description.seed, "bootstrap/reference")
    numbers = np.unique(reference.families, return_inverse=True)[1]
    total = int(numbers.max()) + 1
    counts = np.concatenate([np.ones((1, total)), resample_counts(total, rng)])
    alike = (reference.rho < ALIKE).astype(np.float64)
    sums = np.bincount(numbers, alike * weights, total)
    sizes = np.bincount(numbers, weights, total)
    floors = counts @ sums / np.maximum(counts @ sizes, 1e-12)
    shares = estimates._means((rho < ALIKE).astype(np.float64))
    return CopyExcess(
        share=float(shares[0]),
        floor=float(floors[0]),
        excess=estimates._metric("copies", shares - floors, reference.families),
        z=_stratified_rank_test(rho, conditions, reference.rho, reference.groups, numbers),
    )


def _group_weights(groups: Int64, reference: Int64) -> Float64:
    """Weights of the reference [T] so that its groups are as frequent as those of samples [N]; images of groups
    unknown to the reference weigh on all of it alike."""
    shares = np.bincount(groups[groups >= 0], minlength=int(reference.max()) + 1)[reference].astype(
        np.float64
    )
    sizes = np.bincount(reference, minlength=int(reference.max()) + 1)[reference]
    unknown = (groups < 0).sum() / len(reference)
    weights: Float64 = shares / sizes + unknown
    return weights


def _stratified_rank_test(
    rho: Float64, conditions: Conditions, reference: Float64, groups: Int64, units: Int64
) -> float:
    """z of the van Elteren test (Mann-Whitney by group), each family counted as one observation, its median."""
    statistic = variance = 0.0
    for group in np.intersect1d(np.unique(conditions.groups), groups):
        mine = _family_medians(rho, conditions.families, conditions.groups == group)
        theirs = _family_medians(reference, units, groups == group)
        n, m = len(mine), len(theirs)
        below = (mine[:, None] > theirs[None]).sum() + 0.5 * (mine[:, None] == theirs[None]).sum()
        weight = 1 / (n + m + 1)
        statistic += weight * (below - n * m / 2)
        variance += weight**2 * n * m * (n + m + 1) / 12
    return float(statistic / np.sqrt(variance)) if variance > 0 else 0.0


def _family_medians(values: Float64, families: Int64, chosen: Mask) -> Float64:
    names = np.unique(families[chosen])
    return np.array([np.median(values[chosen & (families == name)]) for name in names])
