"""Comparing samples of one model with real images: every metric of one model on one condition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import memorisation, metrics, retrieval, statistics
from pipeline.evaluation.conditions import CaptionSet, family_of
from pipeline.evaluation.features import Extractor, Whitening
from pipeline.evaluation.metrics import Float64, Metric
from pipeline.evaluation.samples import BASELINE, Samples
from pipeline.evaluation.statistics import Int64

MAX_REFERENCE = 4000  # real training images that sets are compared with; more would only cost memory


@dataclass(frozen=True)
class Reference:
    """The real training images, and what was fitted on them."""

    images: Tensor  # uint8 [n,3,R,R]
    bases: list[str]
    captions: list[int]
    rows: Int64
    raw: dict[str, Float64]  # features by extractor
    whitening: dict[str, Whitening]
    judge: retrieval.Judge

    def white(self, name: str) -> Float64:
        """Whitened features of the training images."""
        return self.whitening[name](self.raw[name])


def build_reference(dataset: PreparedDataset, extractors: list[Extractor], seed: int) -> Reference:
    """Features of at most MAX_REFERENCE training images, their whitening, and the caption judge."""
    rows = dataset.split("train")
    if len(rows) > MAX_REFERENCE:
        chosen = statistics.generator(seed, "reference").choice(len(rows), MAX_REFERENCE, replace=False)
        rows = rows[np.sort(chosen)]
    images = dataset.images(rows)
    bases = [family_of(dataset.rows[row]) for row in rows]
    ids = [dataset.caption_of(int(row)) for row in rows]
    raw = {extractor.name: extractor(images) for extractor in extractors}
    captioned = np.array([i >= 0 for i in ids])
    judge = retrieval.Judge.fit(
        np.concatenate(list(raw.values()), 1)[captioned],
        dataset.text([i for i in ids if i >= 0]).pooled.double().numpy(),
        [base for base, keep in zip(bases, captioned, strict=True) if keep],
    )
    whitening = {name: Whitening.fit(features) for name, features in raw.items()}
    return Reference(images, bases, ids, rows, raw, whitening, judge)


@dataclass(frozen=True)
class RealImages:
    """The real images with which samples of a condition are compared, and their captions as candidates."""

    images: Tensor
    white: dict[str, Float64]
    units: Int64  # bases, numbered together with those of the condition
    condition_units: Int64
    counts: Float64  # bootstraps [B, U], the same for every model
    sharpness: metrics.Sharpness  # of the condition's own real images
    candidates: Float64  # standardised caption vectors [c, e]
    truth: Int64  # [n] candidate of each caption of the condition


def build_real_images(
    condition: CaptionSet,
    dataset: PreparedDataset,
    reference: Reference,
    held_out: dict[str, Float64],
    seed: int,
) -> RealImages:
    """Held-out samples are compared with the held-out images, others with all training images."""
    own = condition.split == "heldout"
    bases = condition.bases if own else reference.bases
    (units, condition_units), num_units = statistics.number_units(bases, condition.bases)
    rng = statistics.generator(seed, f"bootstrap/{condition.split}")
    unique = sorted(set(condition.caption_ids))
    vectors = dataset.text(unique).pooled.double().numpy()
    return RealImages(
        condition.images if own else reference.images,
        {name: held_out[name] if own else reference.white(name) for name in reference.raw},
        units,
        condition_units,
        statistics.resample_counts(num_units, rng),
        metrics.sharpness(condition.images),
        reference.judge.vectors(vectors),
        np.searchsorted(unique, condition.caption_ids).astype(np.int64),
    )


@dataclass(frozen=True)
class ModelMeasures:
    """All metrics of one model on one condition, and what the report shows beside them."""

    metrics: dict[str, Metric]
    kid: dict[str, statistics.KidSamples]
    neighbours: memorisation.Neighbours


def measure(
    samples: Samples,
    condition: CaptionSet,
    real: RealImages,
    reference: Reference,
    extractors: list[Extractor],
    draws: int,
    held_out: memorisation.Neighbours,
) -> ModelMeasures:
    """Measure one model on one condition.

    Precision, recall, density and coverage depend on the sample count, so they use what every model has: the
    first `num_teacher` captions, `draws` samples each. All else uses every sample."""
    common = (samples.which < condition.num_teacher) & (samples.draw < draws)
    raw = {extractor.name: extractor(samples.images) for extractor in extractors}
    found: dict[str, Metric] = {}
    kids = {}
    for extractor in extractors:
        name, prefix = extractor.name, f"{extractor.name}_" if extractor.related_to_discriminator else ""
        fake = reference.whitening[name](raw[name])
        units = real.condition_units[samples.which]
        kids[name] = statistics.KidSamples.measure(real.white[name], real.units, fake, units, real.counts)
        found[f"{prefix}kid"] = kids[name].metric
        found[f"{prefix}fd"] = _frechet(real.white[name], fake)
        neighbourhood = _prdc(real.white[name], fake[common])
        found |= {f"{prefix}{key}": value for key, value in neighbourhood.items()}
    own = condition.images[torch.from_numpy(np.unique(samples.which))]
    found |= compare_sharpness(
        real.sharpness if len(own) == len(condition.rows) else metrics.sharpness(own), samples.images
    )
    neighbours = memorisation.nearest(samples.images, reference.images, reference.bases)
    found["copies"] = memorisation.copies(neighbours)
    found["copying_score"] = memorisation.copying_score(neighbours, held_out)
    predicted = reference.judge.predict(np.concatenate(list(raw.values()), 1))
    for k in (1, 5):
        found[f"retrieval_top{k}"] = retrieval.top_k(predicted, real.candidates, real.truth[samples.which], k)
    return ModelMeasures(found, kids, neighbours)


def _frechet(real: Float64, fake: Float64) -> Metric:
    n = min(len(real), len(fake))
    if not metrics.enough("fd", n):
        return Metric.refused("fd", n)
    return Metric(metrics.frechet_distance(real, fake), n)


def _prdc(real: Float64, fake: Float64) -> dict[str, Metric]:
    n = min(len(real), len(fake))
    names = ("precision", "recall", "density", "coverage")
    if not metrics.enough("recall", n):
        return {name: Metric.refused(name, n) for name in names}
    return {name: Metric(value, n) for name, value in metrics.prdc(real, fake).items()}


def compare_sharpness(real: metrics.Sharpness, images: Tensor) -> dict[str, Metric]:
    """Metrics `top_octave`, `laplacian`, `gradient` (see metrics.compare_sharpness), or their refusals."""
    n = min(len(real.top_octave), len(images))
    if not metrics.enough("sharpness", n):
        return {name: Metric.refused("sharpness", n) for name in ("top_octave", "laplacian", "gradient")}
    compared = metrics.compare_sharpness(real, metrics.sharpness(images))
    return {name: Metric(value, n) for name, value in compared.items()}


def measure_real(
    condition: CaptionSet, real: RealImages, reference: Reference, raw: dict[str, Float64] | None
) -> dict[str, Metric]:
    """What real pictures of the same captions score: how often they look like copies, and retrieval.

    Training pictures (`raw` None) are judged by regressions that have not seen their base."""
    found = {}
    if raw is None:
        captioned = [row for row, i in zip(reference.rows, reference.captions, strict=True) if i >= 0]
        place = {int(row): i for i, row in enumerate(captioned)}
        kept = np.array([i for i, row in enumerate(condition.rows) if int(row) in place], dtype=np.int64)
        predicted = reference.judge.out_of_fold[[place[int(condition.rows[i])] for i in kept]]
    else:
        kept = np.arange(len(condition.rows))
        predicted = reference.judge.predict(np.concatenate(list(raw.values()), 1))
        neighbours = memorisation.nearest(condition.images, reference.images, reference.bases)
        found["copies"] = memorisation.copies(neighbours)
    for k in (1, 5):
        found[f"retrieval_top{k}"] = retrieval.top_k(predicted, real.candidates, real.truth[kept], k)
    return found


def measure_floors(
    reference: Reference,
    held_out: CaptionSet,
    white: dict[str, Float64],
    extractors: list[Extractor],
    seed: int,
) -> dict[str, Metric]:
    """What two sets of real images differ by."""
    floors = {}
    for extractor in extractors:
        name, prefix = extractor.name, f"{extractor.name}_" if extractor.related_to_discriminator else ""
        train = reference.white(name)
        rng = statistics.generator(seed, f"floor/{name}")
        floors[f"{prefix}kid_train_test"] = statistics.kid_between(
            train, reference.bases, white[name], held_out.bases, rng
        )
        size = len(held_out.rows)
        floors[f"{prefix}kid_half_half"] = statistics.kid_of_halves(train, reference.bases, size, rng)
    power = metrics.sharpness(reference.images).top_octave
    rng = statistics.generator(seed, "floor/sharpness")
    floors["sharpness_half_half"] = statistics.sharpness_of_halves(power, len(held_out.rows), rng)
    return floors


def add_differences(measured: dict[str, ModelMeasures], extractors: list[Extractor]) -> None:
    """Add `kid_difference` to the baseline, paired by base, to the metrics of every other model."""
    for name, each in measured.items():
        if name == BASELINE:
            continue
        for extractor in extractors:
            prefix = f"{extractor.name}_" if extractor.related_to_discriminator else ""
            paired = each.kid[extractor.name].minus(measured[BASELINE].kid[extractor.name])
            each.metrics[f"{prefix}kid_difference"] = paired
