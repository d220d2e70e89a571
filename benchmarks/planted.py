"""Models of known quality, for benchmarks.operating: images of a good teacher, planted faults, and evidence on
families that are drawn at random from a pool in which every image was measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import damage, metrics, statistics
from pipeline.evaluation.comparison import CaptionJudge, Margin, RealImages, kid_margins, measure_real
from pipeline.evaluation.conditions import SPLITS, CaptionSet, build_caption_set, family_of
from pipeline.evaluation.evidence import Conditions, Description, Evidence, Measured, Reference
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.memorisation import TrainingImages, thumbnails, two_nearest
from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.statistics import Int64

BASELINE, OTHER_SEEDS, MORE_CALLS, REAL = (
    "teacher",
    "teacher, other seeds",
    "teacher, more calls",
    "real images",
)
COPY_SHARE = 0.2
COPIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "20% copies, noised": partial(damage.add_noise, std=8, seed=0),
    "20% copies, shifted": partial(damage.shift, px=2),
    "20% copies, blurred": partial(damage.blur, sigma_px=1.0),
}
BLURRED = "blurred, 1 px"
DAMAGED: Mapping[str, Callable[[Tensor], Tensor]] = {
    BLURRED: partial(damage.blur, sigma_px=1.0),
    "over-sharpened": partial(damage.sharpen, amount=2.0),
    "dithered": partial(damage.dither, levels=8),
}
HALF, SHUFFLED, ONE = "half of the families missing", "captions shuffled", "one image for all"
BATCH_SIZE = 16  # of feature extractors: larger batches leave the caches


class Case(NamedTuple):
    """Whose images are judged, and with whom they are compared."""

    images: str
    equal_cost: str = OTHER_SEEDS
    baseline: str = BASELINE


GOOD: Mapping[str, Case] = {
    REAL: Case(REAL),
    OTHER_SEEDS: Case(OTHER_SEEDS, equal_cost=BASELINE),
    MORE_CALLS: Case(MORE_CALLS),
    "better than the champion": Case(OTHER_SEEDS, equal_cost=BASELINE, baseline=BLURRED),
}
BAD: Mapping[str, Case] = {
    **{name: Case(name) for name in (*DAMAGED, HALF, SHUFFLED, ONE, *COPIES)},
    "worse at equal cost": Case(OTHER_SEEDS, equal_cost=REAL),
    "worse than the champion": Case(OTHER_SEEDS, equal_cost=BASELINE, baseline=REAL),
}


@dataclass(frozen=True)
class CaseImages:
    """What one case measures on one caption set: as evidence, but with the distances to every training
    family, since which of them there are depends on the draw."""

    measured: Measured  # rho and distance are not filled in
    by_family: Float64  # [N,F] distance to the nearest image of each training family

    def take(self, rows: Int64, caption_rank: Float64) -> CaseImages:
        """Some of the images, in this order, for other captions."""
        old = self.measured
        features = {name: each[rows] for name, each in old.features.items()}
        nothing = np.zeros(len(rows))
        return CaseImages(
            Measured(features, old.power[rows], caption_rank, nothing, nothing), self.by_family[rows]
        )


@dataclass(frozen=True)
class Pool:
    """Measurements to draw families from."""

    sets: dict[str, CaptionSet]
    conditions: dict[str, Conditions]  # of the whole pool
    cases: dict[str, dict[str, CaseImages]]  # by caption set and case
    copies: dict[str, CaseImages]  # damaged training images, by case
    train_families: Int64  # [T] of the training images, numbered in the order of their names
    train_names: list[str]  # [F]
    train_groups: Int64  # [T]
    between: Float64  # [T,F] of training images; their own family too
    margins: dict[str, float]
    heldout_margins: dict[str, float]

    @property
    def num_families(self) -> dict[str, int]:
        """Families of captions, by caption set."""
        return {split: len(set(each.families)) for split, each in self.sets.items()}


# --- Measure once.


def measure_cases(
    images: Mapping[str, Tensor],
    real: RealImages,
    extractors: Sequence[Extractor],
    training: TrainingImages,
    judge: CaptionJudge,
    families: Int64,
    rng: np.random.Generator,
) -> dict[str, CaseImages]:
    """All cases but the copies, of one caption set: from the images of BASELINE, OTHER_SEEDS, MORE_CALLS and
    REAL, in the same order of captions.

    In HALF the teacher's images of present families take the place of those of missing ones: asked for what it
    cannot draw, such a model draws something else."""
    raw, cases = measure(
        {**images, **{name: change(images[OTHER_SEEDS]) for name, change in DAMAGED.items()}},
        real,
        extractors,
        training,
        judge,
    )
    other = cases[OTHER_SEEDS]
    n = len(families)
    missing = rng.permutation(int(families.max()) + 1)[families] % 2 == 1
    at = np.flatnonzero(missing)
    source = rng.choice(np.flatnonzero(~missing), len(at))
    by_family = other.by_family.copy()
    by_family[at] = cases[BASELINE].by_family[source]
    shown = {key: each.copy() for key, each in raw[OTHER_SEEDS].items()}
    for key, each in shown.items():
        each[at] = raw[BASELINE][key][source]
    half = replace(_put(other.measured, at, cases[BASELINE].measured, source), caption_rank=judge.rank(shown))
    cases[HALF] = CaseImages(half, by_family)
    for name, rows in ((SHUFFLED, rng.permutation(n)), (ONE, np.zeros(n, dtype=np.int64))):
        ranks = judge.rank({key: each[rows] for key, each in raw[OTHER_SEEDS].items()})
        cases[name] = other.take(rows, ranks)
    return cases


def measure(
    images: Mapping[str, Tensor],
    real: RealImages,
    extractors: Sequence[Extractor],
    training: TrainingImages,
    judge: CaptionJudge | None = None,
) -> tuple[dict[str, dict[str, Float64]], dict[str, CaseImages]]:
    """Raw features by name of the images and extractor, and all measurements; of captions where there is a judge.
    All have the same number of images."""
    raw = {name: {e.name: e(each, BATCH_SIZE) for e in extractors} for name, each in images.items()}
    small = torch.cat([thumbnails(each) for each in images.values()])
    near = np.split(training.by_family(small), len(images))
    cases = {}
    for (name, each), by_family in zip(images.items(), near, strict=True):
        features = {key: real.whitening[key](values) for key, values in raw[name].items()}
        nothing = np.zeros(len(each))
        ranks = nothing if judge is None else judge.rank(raw[name])
        power = metrics.sharpness(each).top_octave
        cases[name] = CaseImages(Measured(features, power, ranks, nothing, nothing), by_family)
    return raw, cases


def build_pool(
    dataset: PreparedDataset,
    extractors: Sequence[Extractor],
    draw: Callable[[CaptionSet], Mapping[str, Tensor]],
    margins: tuple[Margin, Margin],
    log: Callable[[str], None],
) -> Pool:
    """Measure every case on every family. `draw` gives the images of BASELINE, OTHER_SEEDS and MORE_CALLS;
    `margins` are the narrow and the wide one of KID."""
    real = measure_real(dataset, extractors, 0)
    groups = np.searchsorted(real.group_names, real.groups)
    (families,), _ = statistics.number_families(real.families)
    training = TrainingImages(real.images.__getitem__, families)
    sets, conditions, cases = {}, {}, {}
    for split, source in SPLITS.items():
        count = len({family_of(row) for row in dataset.rows if row["split"] == source})
        captions = sets[split] = build_caption_set(dataset, split, source, count, 0)
        (numbered, of_real), _ = statistics.number_families(
            captions.families, real.families if split == "train" else captions.families
        )
        images = {REAL: captions.images, **draw(captions)}
        judge = CaptionJudge.build(captions, dataset, real, extractors)
        rng = statistics.generator(0, f"plant/{split}")
        cases[split] = measure_cases(images, real, extractors, training, judge, numbered, rng)
        shown = cases[split][REAL].measured
        white = {e.name: real.white(e.name) for e in extractors} if split == "train" else shown.features
        places = {name: i for i, name in enumerate(real.group_names)}
        own = np.array([places.get(group, -1) for group in captions.groups], dtype=np.int64)
        conditions[split] = Conditions(numbered, own, shown.power, white, of_real)
        log(f"measured {len(cases[split])} cases of {count} images on {split} captions")
    copies = {name: change(real.images) for name, change in COPIES.items()}
    return Pool(
        sets,
        conditions,
        cases,
        measure(copies, real, extractors, training)[1],
        families,
        sorted(set(real.families)),
        groups,
        training.by_family(thumbnails(real.images)),
        *kid_margins(extractors, real, margins),
    )


# --- Draw often.


def draw_evidence(pool: Pool, num_train: int, num_heldout: int, rng: np.random.Generator) -> Evidence:
    """Evidence on random families, with the images of every case, and no candidate yet."""
    chosen = {
        split: set(rng.choice(sorted(set(pool.sets[split].families)), count, replace=False).tolist())
        for split, count in (("train", num_train), ("heldout", num_heldout))
    }
    kept_train = np.array([i for i, name in enumerate(pool.train_names) if name in chosen["train"]])
    of_train = np.isin(pool.train_families, kept_train)
    conditions, measured = {}, {}
    for split, whole in pool.conditions.items():
        named = pool.sets[split].families
        rows = np.array([i for i, family in enumerate(named) if family in chosen[split]])
        real = of_train if split == "train" else np.isin(whole.real_families, whole.families[rows])
        drawn, of_real = whole.families[rows], whole.real_families[real]
        numbered = np.unique(np.concatenate([drawn, of_real]), return_inverse=True)[1]
        conditions[split] = Conditions(
            numbered[: len(drawn)],
            whole.groups[rows],
            whole.power[rows],
            {name: features[real] for name, features in whole.real.items()},
            numbered[len(drawn) :],
        )
        measured[split] = {name: _select(each, rows, kept_train) for name, each in pool.cases[split].items()}
        for name, copies in pool.copies.items():
            base = measured[split][OTHER_SEEDS]
            if split == "heldout":
                base = _mix(base, _select(copies, np.flatnonzero(of_train), kept_train), rng)
            measured[split][name] = base
    between = pool.between[of_train][:, kept_train]
    numbers = np.searchsorted(kept_train, pool.train_families[of_train])
    between[np.arange(len(between)), numbers] = np.inf
    d1, d2 = two_nearest(between)
    description = Description(
        seed=int(rng.integers(2**31)),
        extractors=list(pool.margins),
        margins=pool.margins,
        heldout_margins=pool.heldout_margins,
        floors={},
        candidates={},
        equal_cost={},
        baseline=BASELINE,
        nfe=dict.fromkeys(measured["train"], 1),
        multiply_adds={},
    )
    reference = Reference(d1 / np.maximum(d2, 1e-12), numbers, pool.train_groups[of_train])
    return Evidence(description, conditions, measured, reference)


def _select(case: CaseImages, rows: Int64, kept_train: Int64) -> Measured:
    """Some images, with their nearest families among those kept."""
    d1, d2 = two_nearest(case.by_family[rows][:, kept_train])
    whole = case.measured
    return Measured(
        {name: features[rows] for name, features in whole.features.items()},
        whole.power[rows],
        whole.caption_rank[rows],
        d1 / np.maximum(d2, 1e-12),
        d1,
    )


def _mix(base: Measured, copies: Measured, rng: np.random.Generator) -> Measured:
    """`base` with COPY_SHARE of its images replaced by random ones of `copies`."""
    n = len(base.power)
    at = rng.permutation(n)[: round(COPY_SHARE * n)]
    return _put(base, at, copies, rng.choice(len(copies.power), len(at)))


def _put(base: Measured, at: Int64, other: Measured, source: Int64) -> Measured:
    """`base` with the images `source` of another in the places `at`, which keep their ranks of captions."""

    def put(into: Float64, values: Float64) -> Float64:
        out = into.copy()
        out[at] = values[source]
        return out

    return replace(
        base,
        features={name: put(each, other.features[name]) for name, each in base.features.items()},
        power=put(base.power, other.power),
        rho=put(base.rho, other.rho),
        distance=put(base.distance, other.distance),
    )
