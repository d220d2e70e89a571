"""Comparing samples of the models with real images: every metric of every model on every caption set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
Table = dict[str, dict[str, Metric]]  # by model, or "real", and metric


@dataclass(frozen=True)
class Reference:
    """The real training images, and what was fitted on them."""

    images: Tensor  # uint8 [n,3,R,R]
    families: list[str]
    captions: list[int]  # caption ids, -1 for none
    rows: Int64  # [n] of the data set
    raw: dict[str, Float64]  # features by extractor
    whitening: dict[str, Whitening]
    judge: retrieval.Judge

    def white(self, name: str) -> Float64:
        """Whitened features of the training images."""
        return self.whitening[name](self.raw[name])


def build_reference(dataset: PreparedDataset, extractors: Sequence[Extractor], seed: int) -> Reference:
    """Features of at most MAX_REFERENCE training images, their whitening, and the caption judge."""
    rows = dataset.split("train")
    if len(rows) > MAX_REFERENCE:
        chosen = statistics.generator(seed, "reference").choice(len(rows), MAX_REFERENCE, replace=False)
        rows = rows[np.sort(chosen)]
    images = dataset.images(rows)
    families = [family_of(dataset.rows[row]) for row in rows]
    ids = [dataset.caption_of(int(row)) for row in rows]
    raw = {extractor.name: extractor(images) for extractor in extractors}
    captioned = np.array([i >= 0 for i in ids])
    judge = retrieval.Judge.fit(
        np.concatenate(list(raw.values()), 1)[captioned],
        dataset.text([i for i in ids if i >= 0]).pooled.double().numpy(),
        [family for family, keep in zip(families, captioned, strict=True) if keep],
    )
    whitening = {name: Whitening.fit(features) for name, features in raw.items()}
    return Reference(images, families, ids, rows, raw, whitening, judge)


@dataclass(frozen=True)
class HeldOut:
    """The held-out images: what was measured on them once, for all models."""

    caption_set: CaptionSet
    raw: dict[str, Float64]  # features by extractor
    white: dict[str, Float64]
    neighbours: memorisation.Neighbours  # among the training images


def build_held_out(caption_set: CaptionSet, reference: Reference, extractors: Sequence[Extractor]) -> HeldOut:
    """Features and nearest training images of the held-out images."""
    raw = {extractor.name: extractor(caption_set.images) for extractor in extractors}
    white = {name: reference.whitening[name](features) for name, features in raw.items()}
    neighbours = memorisation.nearest(caption_set.images, reference.images, reference.families)
    return HeldOut(caption_set, raw, white, neighbours)


@dataclass(frozen=True)
class RealImages:
    """The real images with which samples of a caption set are compared, and the captions to retrieve from."""

    images: Tensor
    white: dict[str, Float64]  # features by extractor
    families: Int64  # numbered together with those of the captions
    caption_families: Int64
    counts: Float64  # bootstraps [B, F], the same for every model
    sharpness: metrics.Sharpness  # of the real images of the captions themselves
    candidates: Float64  # standardised caption vectors [c, e]
    truth: Int64  # [n] candidate of each caption


def build_real_images(
    caption_set: CaptionSet, dataset: PreparedDataset, reference: Reference, held_out: HeldOut, seed: int
) -> RealImages:
    """Held-out samples are compared with the held-out images, others with all training images."""
    is_held_out = caption_set.split == "heldout"
    families = caption_set.families if is_held_out else reference.families
    numbered, num_families = statistics.number_families(families, caption_set.families)
    rng = statistics.generator(seed, f"bootstrap/{caption_set.split}")
    unique = sorted(set(caption_set.caption_ids))
    vectors = dataset.text(unique).pooled.double().numpy()
    return RealImages(
        caption_set.images if is_held_out else reference.images,
        {name: held_out.white[name] if is_held_out else reference.white(name) for name in reference.raw},
        numbered[0],
        numbered[1],
        statistics.resample_counts(num_families, rng),
        metrics.sharpness(caption_set.images),
        reference.judge.vectors(vectors),
        np.searchsorted(unique, caption_set.caption_ids).astype(np.int64),
    )


# --- Metrics of one model.


@dataclass(frozen=True)
class ModelMeasures:
    """All metrics of one model on one caption set, and what the report shows beside them."""

    metrics: dict[str, Metric]
    kid: dict[str, statistics.KidSamples]  # by extractor
    neighbours: memorisation.Neighbours


def measure(
    samples: Samples,
    caption_set: CaptionSet,
    real: RealImages,
    reference: Reference,
    extractors: Sequence[Extractor],
    draws: int,
    held_out: HeldOut,
) -> ModelMeasures:
    """Measure one model on one caption set.

    Precision, recall, density and coverage depend on the sample count, so they use what every model has: the
    first `num_teacher` captions, `draws` samples each. All else uses every sample."""
    common = (samples.which < caption_set.num_teacher) & (samples.draw < draws)
    raw = {extractor.name: extractor(samples.images) for extractor in extractors}
    results: dict[str, Metric] = {}
    kids = {}
    for extractor in extractors:
        name, prefix = extractor.name, extractor.prefix
        fake = reference.whitening[name](raw[name])
        families = real.caption_families[samples.which]
        kids[name] = statistics.KidSamples.measure(
            real.white[name], real.families, fake, families, real.counts
        )
        results[f"{prefix}kid"] = kids[name].metric
        results[f"{prefix}fd"] = _frechet(real.white[name], fake)
        neighbourhood = _prdc(real.white[name], fake[common])
        results |= {f"{prefix}{key}": value for key, value in neighbourhood.items()}
    own = caption_set.images[torch.from_numpy(np.unique(samples.which))]
    results |= compare_sharpness(
        real.sharpness if len(own) == len(caption_set.rows) else metrics.sharpness(own), samples.images
    )
    neighbours = memorisation.nearest(samples.images, reference.images, reference.families)
    results["copies"] = memorisation.copies(neighbours)
    results["copying_score"] = memorisation.copying_score(neighbours, held_out.neighbours)
    predicted = reference.judge.predict(np.concatenate(list(raw.values()), 1))
    results |= _retrieval(predicted, real, real.truth[samples.which])
    return ModelMeasures(results, kids, neighbours)


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


def _retrieval(predicted: Float64, real: RealImages, truth: Int64) -> dict[str, Metric]:
    return {f"retrieval_top{k}": retrieval.top_k(predicted, real.candidates, truth, k) for k in (1, 5)}


def compare_sharpness(real: metrics.Sharpness, images: Tensor) -> dict[str, Metric]:
    """Metrics `top_octave`, `laplacian`, `gradient` (see metrics.compare_sharpness), or their refusals."""
    n = min(len(real.top_octave), len(images))
    if not metrics.enough("sharpness", n):
        return {name: Metric.refused("sharpness", n) for name in ("top_octave", "laplacian", "gradient")}
    compared = metrics.compare_sharpness(real, metrics.sharpness(images))
    return {name: Metric(value, n) for name, value in compared.items()}


def add_differences(measured: Mapping[str, ModelMeasures], extractors: Sequence[Extractor]) -> None:
    """Add `kid_difference` to the baseline, paired by family, to the metrics of every other model."""
    for name, model in measured.items():
        if name == BASELINE:
            continue
        for extractor in extractors:
            paired = model.kid[extractor.name].minus(measured[BASELINE].kid[extractor.name])
            model.metrics[f"{extractor.prefix}kid_difference"] = paired


# --- Metrics of real images.


def measure_real(
    caption_set: CaptionSet, real: RealImages, reference: Reference, held_out: HeldOut
) -> dict[str, Metric]:
    """Metrics of the real images of the captions: retrieval and, of held-out ones, how many look like copies.

    Training images are judged by regressions that have not seen their family."""
    if caption_set.split == "heldout":
        predicted = reference.judge.predict(np.concatenate(list(held_out.raw.values()), 1))
        copies = {"copies": memorisation.copies(held_out.neighbours)}
        return copies | _retrieval(predicted, real, real.truth)
    captioned = [row for row, i in zip(reference.rows, reference.captions, strict=True) if i >= 0]
    place = {int(row): i for i, row in enumerate(captioned)}
    kept = np.array([i for i, row in enumerate(caption_set.rows) if int(row) in place], dtype=np.int64)
    predicted = reference.judge.out_of_fold[[place[int(caption_set.rows[i])] for i in kept]]
    return _retrieval(predicted, real, real.truth[kept])


def measure_floors(
    reference: Reference, held_out: HeldOut, extractors: Sequence[Extractor], seed: int
) -> dict[str, Metric]:
    """Noise floors: by how much two sets of real images differ."""
    floors = {}
    size = len(held_out.caption_set.rows)
    for extractor in extractors:
        name, prefix = extractor.name, extractor.prefix
        train = reference.white(name)
        rng = statistics.generator(seed, f"floor/{name}")
        floors[f"{prefix}kid_train_test"] = statistics.kid_between(
            train, reference.families, held_out.white[name], held_out.caption_set.families, rng
        )
        floors[f"{prefix}kid_half_half"] = statistics.kid_of_halves(train, reference.families, size, rng)
    power = metrics.sharpness(reference.images).top_octave
    rng = statistics.generator(seed, "floor/sharpness")
    floors["sharpness_half_half"] = statistics.sharpness_of_halves(power, size, rng)
    return floors


# --- All of it.


@dataclass(frozen=True)
class Comparison:
    """Metrics of all models on all caption sets."""

    reference: Reference
    floors: dict[str, Metric]
    models: dict[str, dict[str, ModelMeasures]]  # by split and model
    tables: dict[str, Table]  # by split; with the real images among the models


def compare(
    samples: Mapping[str, Mapping[str, Samples]],
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
    extractors: Sequence[Extractor],
    draws: int,
    seed: int,
    log: Callable[[str], None],
) -> Comparison:
    """Measure `samples` (by split and model); the first of `caption_sets` holds the held-out captions.

    `draws`: the number of samples per caption that every model has (see `measure`)."""
    log(f"features: {' and '.join(extractor.name for extractor in extractors)}")
    reference = build_reference(dataset, extractors, seed)
    held_out = build_held_out(caption_sets[0], reference, extractors)
    floors = measure_floors(reference, held_out, extractors, seed)
    models: dict[str, dict[str, ModelMeasures]] = {}
    tables: dict[str, Table] = {}
    for caption_set in caption_sets:
        split = caption_set.split
        real = build_real_images(caption_set, dataset, reference, held_out, seed)
        models[split] = {
            name: measure(each, caption_set, real, reference, extractors, draws, held_out)
            for name, each in samples[split].items()
        }
        add_differences(models[split], extractors)
        tables[split] = {"real": measure_real(caption_set, real, reference, held_out)}
        tables[split] |= {name: model.metrics for name, model in models[split].items()}
        log(f"metrics: {split}, {len(caption_set.rows)} captions, {len(models[split])} models")
    return Comparison(reference, floors, models, tables)
