"""From samples to evidence: real and drawn images go through the same measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import damage, metrics, qualification, retrieval, statistics
from pipeline.evaluation.conditions import CaptionSet, family_of, group_of
from pipeline.evaluation.copies import search_copies
from pipeline.evaluation.evidence import Conditions, Description, Evidence, Measured
from pipeline.evaluation.features import Extractor, Whitening
from pipeline.evaluation.memorisation import Neighbours
from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.qualification import Qualification
from pipeline.evaluation.samples import Samples
from pipeline.evaluation.statistics import Int64
from pipeline.models.shape import Images, map_images, take

MAX_REFERENCE = 4000  # real training images that sets are compared with; copies are sought among all
MAX_DAMAGED = 600  # of them, for the margins


@dataclass(frozen=True)
class RealImages:
    """At most MAX_REFERENCE real training images, and what was fitted on them."""

    images: Images  # uint8 [3,H,W] each
    families: list[str]
    groups: list[str]
    captions: list[int]  # caption ids, -1 for none
    rows: Int64  # [n] of the data set
    raw: dict[str, Float64]  # features by extractor
    whitening: dict[str, Whitening]
    judge: retrieval.Judge | None  # None without captions

    @property
    def group_names(self) -> list[str]:
        """The groups, in the order of their numbers."""
        return sorted(set(self.groups))

    def white(self, name: str) -> Float64:
        """Whitened features of the training images."""
        return self.whitening[name](self.raw[name])


def measure_real(dataset: PreparedDataset, extractors: Sequence[Extractor], seed: int) -> RealImages:
    """Features of at most MAX_REFERENCE training images, their whitening, and the caption judge."""
    rows = dataset.split("train")
    if len(rows) > MAX_REFERENCE:
        chosen = statistics.generator(seed, "reference").choice(len(rows), MAX_REFERENCE, replace=False)
        rows = rows[np.sort(chosen)]
    images = dataset.pictures(rows)
    families = [family_of(dataset.rows[row]) for row in rows]
    ids = [dataset.caption_of(int(row)) for row in rows]
    raw = {extractor.name: extractor(images) for extractor in extractors}
    captioned = np.array([i >= 0 for i in ids])
    judge = None
    if captioned.any():
        judge = retrieval.Judge.fit(
            np.concatenate(list(raw.values()), 1)[captioned],
            dataset.text([i for i in ids if i >= 0]).pooled.double().numpy(),
            [family for family, keep in zip(families, captioned, strict=True) if keep],
        )
    whitening = {name: Whitening.fit(features) for name, features in raw.items()}
    groups = [group_of(dataset.rows[row]) for row in rows]
    return RealImages(images, families, groups, ids, rows, raw, whitening, judge)


def qualify_all(
    extractors: Sequence[Extractor], real: RealImages, held_out: CaptionSet, log: Callable[[str], None]
) -> list[Qualification]:
    """Whether each extractor orders damage on these data (see qualification.py)."""
    judged = []
    for each in extractors:
        white, images, families = real.white(each.name), held_out.images, held_out.families
        whitening = real.whitening[each.name]
        found = qualification.qualify(each, whitening, white, real.families, images, families)
        log(f"extractor {each.name}: {'qualified' if found.qualified else f'not used, {found.reason}'}")
        judged.append(found)
    return judged


def first_qualified(extractors: Sequence[Extractor], qualifications: Sequence[Qualification]) -> Extractor:
    """The main extractor: the first that qualified, or else the first."""
    pairs = zip(extractors, qualifications, strict=True)
    return next((extractor for extractor, judged in pairs if judged.qualified), extractors[0])


class Margin(NamedTuple):
    """Damage that is hard to see: JPEG of a quality, and noise of a standard deviation in grey levels."""

    jpeg: int
    noise: float


def kid_margin(extractor: Extractor, real: RealImages, margin: Margin) -> float:
    """KID between training images and the same with damage that is hard to see, the larger one of two kinds,
    since an extractor may not see the other: a difference that is known, and independent of the number of
    samples. Pairs of one family are left out."""
    some = statistics.spaced(len(real.images), MAX_DAMAGED)
    (families,), total = statistics.number_families([real.families[i] for i in some])
    white, images = real.whitening[extractor.name], take(real.images, some)
    clean = white(real.raw[extractor.name][some])

    def kid(damaged: Images) -> float:
        fake = white(extractor(damaged))
        return float(statistics.kid_by_family(clean, families, fake, families, np.ones((1, total)))[0])

    compressed = map_images(partial(damage.jpeg, quality=margin.jpeg), images)
    noisy = map_images(partial(damage.add_noise, std=margin.noise, seed=0), images)
    return max(kid(compressed), kid(noisy))


def kid_margins(
    extractors: Sequence[Extractor], real: RealImages, margins: tuple[Margin, Margin]
) -> tuple[dict[str, float], dict[str, float]]:
    """Margins of each extractor on training captions and on held-out ones, from a narrow and a wide damage.
    The narrow one is that of the main extractor on training captions; the others are there for faults that it
    does not see."""
    narrow, wide = margins
    heldout = {each.name: kid_margin(each, real, wide) for each in extractors}
    main = {each.name: kid_margin(each, real, narrow) for each in extractors[:1]}
    return heldout | main, heldout


@dataclass(frozen=True)
class ImageMeasures:
    """Of the images of one contender on one caption set."""

    evidence: Measured
    sharpness: metrics.Sharpness
    neighbours: Neighbours  # among all training images, by rows of the data set


@dataclass(frozen=True)
class Comparison:
    """All evidence, and what the report shows beside it."""

    evidence: Evidence
    real: RealImages
    sets: dict[str, dict[str, ImageMeasures]]  # by caption set and contender, "real" among them
    qualifications: list[Qualification]
    copy_power: dict[str, float] = field(default_factory=dict)  # see copies.CopySearch


def compare(
    samples: Mapping[str, Mapping[str, Samples]],
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
    real: RealImages,
    extractors: Sequence[Extractor],
    qualifications: Sequence[Qualification],
    describe: Callable[[list[str], dict[str, float]], Description],
    log: Callable[[str], None],
) -> Comparison:
    """Measure `samples` (by caption set and contender), and the real images of their captions as the
    contender "real".

    `describe(qualified extractors, noise floors)` gives the description of the evidence."""
    qualified = [e for e, q in zip(extractors, qualifications, strict=True) if q.qualified]
    images = {
        each.split: {"real": take(each.images, each.which)}
        | {n: s.images for n, s in samples[each.split].items()}
        for each in caption_sets
    }
    found = search_copies(images, dataset, real.rows)
    log(f"sought copies of {len(dataset.split('train'))} training images")
    conditions, sets = {}, {}
    for caption_set in caption_sets:
        split = caption_set.split
        judge = CaptionJudge.build(caption_set, dataset, real, extractors)
        sets[split] = {
            name: measure(each, real, extractors, qualified, judge, found.neighbours[split][name])
            for name, each in images[split].items()
        }
        power = sets[split]["real"].sharpness.top_octave
        conditions[split] = build_conditions(caption_set, real, qualified, power)
        log(f"measured {len(images[split])} sets of {len(caption_set.which)} images on {split} captions")
    floors = measure_floors(conditions, real, qualified)
    evidence = Evidence(
        describe([each.name for each in qualified], floors),
        conditions,
        {split: {name: each.evidence for name, each in sets[split].items()} for split in sets},
        found.reference,
    )
    return Comparison(evidence, real, sets, list(qualifications), found.power)


def measure(
    images: Images,
    real: RealImages,
    extractors: Sequence[Extractor],
    qualified: Sequence[Extractor],
    judge: CaptionJudge | None,
    near: Neighbours,
) -> ImageMeasures:
    """Measure N uint8 images of a caption set, which have the neighbours `near`. Captions are judged, if
    there is a judge, from the features of all extractors; the evidence holds those of qualified ones."""
    raw = {each.name: each(images) for each in extractors}
    features = {each.name: real.whitening[each.name](raw[each.name]) for each in qualified}
    sharpness = metrics.sharpness(images)
    ranks = None if judge is None else judge.rank(raw)
    measured = Measured(features, sharpness.top_octave, ranks, near.rho, near.d1)
    return ImageMeasures(measured, sharpness, near)


def build_conditions(
    caption_set: CaptionSet,
    real: RealImages,
    extractors: Sequence[Extractor],
    power: Float64,
) -> Conditions:
    """Held-out samples are compared with the held-out images, others with all training images."""
    drawn = [caption_set.families[i] for i in caption_set.which]
    if caption_set.split == "heldout":
        features = {e.name: real.whitening[e.name](e(caption_set.images)) for e in extractors}
        families = caption_set.families
    else:
        features = {e.name: real.white(e.name) for e in extractors}
        families = real.families
    (numbered, of_real), _ = statistics.number_families(drawn, families)
    place = {name: i for i, name in enumerate(real.group_names)}
    return Conditions(
        families=numbered,
        groups=np.array([place.get(caption_set.groups[i], -1) for i in caption_set.which], dtype=np.int64),
        power=power,
        real=features,
        real_families=of_real,
    )


@dataclass(frozen=True)
class CaptionJudge:
    """Ranks the true caption of an image among all captions of a set (see retrieval.py)."""

    judge: retrieval.Judge
    extractors: list[str]
    candidates: Float64  # standardised caption vectors [c,e]
    truth: Int64  # [N] candidate of each image
    families: list[str]  # [N] of the caption of each image

    @classmethod
    def build(
        cls,
        caption_set: CaptionSet,
        dataset: PreparedDataset,
        real: RealImages,
        extractors: Sequence[Extractor],
    ) -> CaptionJudge | None:
        """For the images of a caption set; None where captions do not tell them apart, or the training images, on
        which it learns, have none."""
        if caption_set.uncaptioned_because or real.judge is None:
            return None
        unique = sorted(set(caption_set.caption_ids))
        vectors = dataset.text(unique).pooled.double().numpy()
        truth = np.searchsorted(unique, [caption_set.caption_ids[i] for i in caption_set.which])
        names = [each.name for each in extractors]
        families = [caption_set.families[i] for i in caption_set.which]
        return cls(real.judge, names, real.judge.vectors(vectors), truth.astype(np.int64), families)

    def rank(self, raw: Mapping[str, Float64]) -> Float64:
        """retrieval.caption_rank of images [N], from their raw features by extractor."""
        features = np.concatenate([raw[name] for name in self.extractors], 1)
        predicted = self.judge.predict(features, self.families)
        return retrieval.caption_rank(predicted, self.candidates, self.truth)


def measure_floors(
    conditions: Mapping[str, Conditions],
    real: RealImages,
    extractors: Sequence[Extractor],
) -> dict[str, float]:
    """Half the width of the 95% interval of KID between two sets of real training images, each as large as the
    samples of a caption set: by "SPLIT/EXTRACTOR". Too small a data set has none."""
    floors = {}
    for split, drawn in conditions.items():
        for extractor in extractors:
            rng = statistics.generator(0, f"floor/{split}/{extractor.name}")
            white, size = real.white(extractor.name), len(drawn.families)
            metric = statistics.kid_of_halves(white, real.families, size, rng)
            if metric.low is not None and metric.high is not None:
                floors[f"{split}/{extractor.name}"] = (metric.high - metric.low) / 2
    return floors
