"""The whole evaluation: sample every model on held-out and on training captions, measure, judge, report.

Results (metrics.json, its summary, verdict.json) hold no time and are byte-equal for equal input; times are in
throughput.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.config import Params
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.sampling import generate
from pipeline.errors import BadData
from pipeline.evaluation import gate, memorisation, metrics, report, retrieval, statistics
from pipeline.evaluation.features import Extractor, Whitening, lite2, randconv, to_resolution
from pipeline.evaluation.metrics import Float64, Metric
from pipeline.evaluation.statistics import Int64
from pipeline.models.snapshot import Snapshot, at_resolution, load_snapshot
from pipeline.rng import key

MAX_REFERENCE = 4000  # real training images that sets are compared with; more would only cost memory
BASELINE = "finetuned"
Say = Callable[[str], None]


# --- What is asked of the models.


@dataclass(frozen=True)
class Condition:
    """Captions of one split, and the real image of each."""

    split: str  # "heldout" or "train"
    rows: Int64  # [n] of the data set
    captions: list[str]
    caption_ids: list[int]
    bases: list[str]
    images: Tensor  # uint8 [n,3,R,R]
    num_teacher: int  # the slow models get only the first so many captions


def base_of(row: Mapping[str, Any]) -> str:
    """The picture of which a row is a variant."""
    return str(row["base"] or row["id"])


def choose_rows(dataset: PreparedDataset, split: str, limit: int, seed: int) -> Int64:
    """At most `limit` captioned rows of a split, in random order, every base once before any comes twice."""
    rows = [int(row) for row in dataset.split(split) if dataset.caption_of(int(row)) >= 0]
    order = statistics.generator(seed, f"captions/{split}").permutation(len(rows))
    seen: dict[str, int] = {}
    ranked = []
    for position, i in enumerate(order):
        base = base_of(dataset.rows[rows[i]])
        ranked.append((seen.get(base, 0), position, rows[i]))
        seen[base] = seen.get(base, 0) + 1
    return np.array([row for _, _, row in sorted(ranked)[:limit]], dtype=np.int64)


def build_condition(
    dataset: PreparedDataset, name: str, split: str, limit: int, num_teacher: int, seed: int
) -> Condition:
    """See Condition."""
    rows = choose_rows(dataset, split, limit, seed)
    ids = [dataset.caption_of(int(row)) for row in rows]
    bases = [base_of(dataset.rows[row]) for row in rows]
    captions = [dataset.captions[i] for i in ids]
    return Condition(name, rows, captions, ids, bases, dataset.images(rows), min(num_teacher, len(rows)))


# --- Sampling.


@dataclass(frozen=True)
class Model:
    """A snapshot as it is sampled: `num_steps` passes of a refined model, or None for its own default."""

    name: str
    snapshot: Snapshot
    num_steps: int | None
    slow: bool


@dataclass(frozen=True)
class Samples:
    """Images of one model for one condition; image i shows caption which[i], as its draw[i]-th sample."""

    native: Tensor  # uint8 [N,3,r,r], as made
    images: Tensor  # uint8 [N,3,R,R], as compared
    which: Int64
    draw: Int64
    nfe: int
    share: float  # of the work of the finest level that was done
    seconds: float


def sample(model: Model, condition: Condition, dataset: PreparedDataset, params: Params) -> Samples:
    """Make the images. A seed depends on caption and draw alone, so that models are compared in pairs."""
    budget = params.evaluate
    num_captions = condition.num_teacher if model.slow else len(condition.rows)
    draws = 1
    if condition.split == "heldout":
        draws = budget.teacher_samples_per_caption if model.slow else budget.samples_per_caption
    draw, which = (grid.ravel() for grid in np.mgrid[:draws, :num_captions])
    seeds = [
        key(params.seed, f"evaluate/{condition.captions[i]}", int(j))
        for i, j in zip(which, draw, strict=True)
    ]
    text = dataset.text([condition.caption_ids[i] for i in which])
    start = time.perf_counter()
    made = generate(model.snapshot, text, seeds, num_steps=model.num_steps, batch_size=budget.batch_size)
    seconds = time.perf_counter() - start
    images = to_resolution(made.images, dataset.resolution)
    return Samples(made.images, images, which, draw, made.nfe, made.share, seconds)


def latency(model: Model, dataset: PreparedDataset, condition: Condition, repeats: int = 5) -> dict[str, Any]:
    """Speed of one image alone, as the median of some."""
    text = dataset.text(condition.caption_ids[:1])
    taken = []
    for i in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        made = generate(model.snapshot, text, [i], num_steps=model.num_steps)
        taken.append(time.perf_counter() - start)
    return speed(1, made.nfe, made.share, float(np.median(taken[1:])))


def speed(images: int, nfe: int, share: float, seconds: float) -> dict[str, Any]:
    """One entry of throughput.json."""
    each = max(seconds, 1e-9) / images
    return {
        "images": images,
        "nfe": nfe,
        "share": round(share, 3),
        "seconds": round(seconds, 3),
        "seconds_per_image": metrics.rounded(each),
        "images_per_second": round(1 / each, 2),
    }


# --- Measuring.


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
    bases = [base_of(dataset.rows[row]) for row in rows]
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
class RealSide:
    """The real images with which samples of a condition are compared, and their captions as candidates."""

    images: Tensor
    white: dict[str, Float64]
    units: Int64  # bases, numbered together with those of the condition
    condition_units: Int64
    counts: Float64  # bootstraps [B, U], the same for every model
    sharpness: metrics.Sharpness  # of the condition's own real images
    candidates: Float64  # standardised caption vectors [c, e]
    truth: Int64  # [n] candidate of each caption of the condition


def real_side(
    condition: Condition,
    dataset: PreparedDataset,
    reference: Reference,
    held_out: dict[str, Float64],
    seed: int,
) -> RealSide:
    """Held-out samples are compared with the held-out images, others with all training images."""
    own = condition.split == "heldout"
    bases = condition.bases if own else reference.bases
    (units, condition_units), num_units = statistics.number_units(bases, condition.bases)
    rng = statistics.generator(seed, f"bootstrap/{condition.split}")
    unique = sorted(set(condition.caption_ids))
    vectors = dataset.text(unique).pooled.double().numpy()
    return RealSide(
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
class Measured:
    """All metrics of one model on one condition, and what the report shows beside them."""

    metrics: dict[str, Metric]
    kid: dict[str, statistics.KidSamples]
    neighbours: memorisation.Neighbours


def measure(
    samples: Samples,
    condition: Condition,
    real: RealSide,
    reference: Reference,
    extractors: list[Extractor],
    draws: int,
    held_out: memorisation.Neighbours,
) -> Measured:
    """Measure one model on one condition.

    Precision, recall, density and coverage depend on the sample count, so they use what every model has: the
    first `num_teacher` captions, `draws` samples each. All else uses every sample."""
    common = (samples.which < condition.num_teacher) & (samples.draw < draws)
    raw = {extractor.name: extractor(samples.images) for extractor in extractors}
    found: dict[str, Metric] = {}
    kids = {}
    for extractor in extractors:
        name, prefix = extractor.name, f"{extractor.name}_" if extractor.leak_suspect else ""
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
    return Measured(found, kids, neighbours)


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
    condition: Condition, real: RealSide, reference: Reference, raw: dict[str, Float64] | None
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
    held_out: Condition,
    white: dict[str, Float64],
    extractors: list[Extractor],
    seed: int,
) -> dict[str, Metric]:
    """What two sets of real images differ by."""
    floors = {}
    for extractor in extractors:
        name, prefix = extractor.name, f"{extractor.name}_" if extractor.leak_suspect else ""
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


# --- All of it.


def evaluate(params: Params, root: Path, say: Say = print, device: str = "cpu") -> dict[str, float]:
    """Evaluate the models below `root`; write reports/evaluation/ and reports/verdict.json there.

    Reads data/prepared, models/finetuned and models/refined. Returns the numbers to track:
    `passed` (0 or 1) and `SPLIT/MODEL/METRIC` for all of metrics.json that was not refused.

    Raises:
        BadData: the test split has no captioned image, or there are fewer than 8 training images.
        InputMissing, StorageError: a model or the data set is missing or damaged.
    """
    dataset = PreparedDataset(root / "data" / "prepared")
    models = load_models(root / "models", params, device)
    conditions = build_conditions(dataset, params)
    held_out = conditions[0]
    extractors = [randconv(dataset.resolution, device=device), lite2(dataset.resolution, device)]

    samples: dict[str, dict[str, Samples]] = {}
    throughput: dict[str, Any] = {}
    for condition in conditions:
        samples[condition.split] = {}
        for model in models:
            made = sample(model, condition, dataset, params)
            samples[condition.split][model.name] = made
            throughput[f"{condition.split}/{model.name}"] = speed(
                len(made.images), made.nfe, made.share, made.seconds
            )
            say(_speed_line(model.name, condition.split, made))
    for model in models:
        if not model.slow:
            throughput[f"one_image/{model.name}"] = latency(model, dataset, held_out)

    say(f"features: {' and '.join(each.name for each in extractors)}")
    reference = build_reference(dataset, extractors, params.seed)
    held_raw = {extractor.name: extractor(held_out.images) for extractor in extractors}
    held_white = {name: reference.whitening[name](raw) for name, raw in held_raw.items()}
    held_neighbours = memorisation.nearest(held_out.images, reference.images, reference.bases)
    floors = measure_floors(reference, held_out, held_white, extractors, params.seed)

    measured: dict[str, dict[str, Measured]] = {}
    tables: dict[str, dict[str, dict[str, Metric]]] = {}
    for condition in conditions:
        real = real_side(condition, dataset, reference, held_white, params.seed)
        own = condition.split == "heldout"
        draws = min(params.evaluate.teacher_samples_per_caption, params.evaluate.samples_per_caption)
        measured[condition.split] = {
            name: measure(made, condition, real, reference, extractors, draws, held_neighbours)
            for name, made in samples[condition.split].items()
        }
        add_differences(measured[condition.split], extractors)
        tables[condition.split] = {
            "real": measure_real(condition, real, reference, held_raw if own else None)
        } | {name: each.metrics for name, each in measured[condition.split].items()}
        say(f"metrics: {condition.split}, {len(condition.rows)} captions, {len(models)} models")

    candidate = next(model for model in models if not model.slow)
    rules = gate.decide(
        tables["heldout"][candidate.name],
        tables["heldout"][BASELINE],
        tables["heldout"][candidate.name]["kid_difference"],
        floors["kid_half_half"],
        floors["sharpness_half_half"],
        all(bool(p.isfinite().all()) for p in candidate.snapshot.denoiser.parameters()),
        gate.Thresholds(
            **{name: getattr(params.promotion, name) for name in gate.Thresholds.__annotations__}
        ),
    )
    data_digest = artifacts.directory_digest(dataset.path)
    verdict = gate.verdict(rules, candidate.snapshot.digest, data_digest)
    results = as_results(tables, floors, extractors, reference, samples, candidate.name, verdict["passed"])

    say("report: pictures and index.html")
    with artifacts.commit_directory(root / "reports" / "evaluation", {"kind": "evaluation"}) as folder:
        (folder / "metrics.json").write_text(_as_json(results), encoding="utf-8")
        (folder / "summary.json").write_text(_as_json(summarise(tables["heldout"])), encoding="utf-8")
        (folder / "throughput.json").write_text(_as_json(throughput), encoding="utf-8")
        for condition in conditions:
            shown = {name: made.native for name, made in samples[condition.split].items()}
            report.draw_captions(
                folder / f"{condition.split}_captions.png", condition.captions, condition.images, shown
            )
        best = samples["heldout"][candidate.name]
        neighbours = measured["heldout"][candidate.name].neighbours
        report.draw_neighbours(
            folder / "neighbours.png",
            best.images,
            [held_out.captions[i] for i in best.which],
            reference.images,
            [dataset.captions[i] if i >= 0 else "" for i in reference.captions],
            neighbours,
        )
        report.draw_quality(folder / "quality.png", results)
        page = report.render(results, verdict, throughput, held_out.captions, models[0].snapshot.resolution)
        (folder / "index.html").write_text(page, encoding="utf-8")
    artifacts.write_atomic(root / "reports" / "verdict.json", _as_json(verdict))
    return {"passed": float(verdict["passed"])} | flatten(tables)


def flatten(tables: dict[str, dict[str, dict[str, Metric]]]) -> dict[str, float]:
    """`SPLIT/MODEL/METRIC` for every number that was not refused."""
    return {
        f"{split}/{model}/{name}": value
        for split, models in tables.items()
        for model, found in models.items()
        for name, metric in found.items()
        if (value := metrics.rounded(metric.value)) is not None
    }


def load_models(folder: Path, params: Params, device: str) -> list[Model]:
    """The core inside of the fine-tuned model, that model, and the refined one once for each number of passes,
    fewest first."""
    refined, finetuned = (load_snapshot(folder / name, device) for name in ("refined", "finetuned"))
    core = at_resolution(finetuned, int(finetuned.config["core"]["resolution"]))
    return [
        Model("core", core, None, slow=True),
        Model(BASELINE, finetuned, None, slow=True),
        *(Model(f"refined_{n}", refined, n, slow=False) for n in sorted(params.evaluate.num_passes)),
    ]


def build_conditions(dataset: PreparedDataset, params: Params) -> list[Condition]:
    """Held-out captions, then training captions (unless evaluate.train_captions is 0)."""
    budget = params.evaluate
    where, fix = str(dataset.path), "add images with captions, or change data.* in params.yaml"
    limit = budget.heldout_captions
    conditions = [build_condition(dataset, "heldout", "test", limit, limit, params.seed)]
    if not len(conditions[0].rows):
        raise BadData("E-DAT-050", where, "no image of the test split has a caption", fix)
    if len(dataset.split("train")) < 8:
        raise BadData("E-DAT-051", where, f"has {len(dataset.split('train'))} training images, needs 8", fix)
    train = build_condition(
        dataset, "train", "train", budget.train_captions, budget.teacher_train_captions, params.seed
    )
    return conditions + ([train] if len(train.rows) else [])


def add_differences(measured: dict[str, Measured], extractors: list[Extractor]) -> None:
    """Add `kid_difference` to the baseline, paired by base, to the metrics of every other model."""
    for name, each in measured.items():
        if name == BASELINE:
            continue
        for extractor in extractors:
            prefix = f"{extractor.name}_" if extractor.leak_suspect else ""
            paired = each.kid[extractor.name].minus(measured[BASELINE].kid[extractor.name])
            each.metrics[f"{prefix}kid_difference"] = paired


def as_results(
    tables: dict[str, dict[str, dict[str, Metric]]],
    floors: dict[str, Metric],
    extractors: list[Extractor],
    reference: Reference,
    samples: dict[str, dict[str, Samples]],
    candidate: str,
    passed: bool,
) -> dict[str, Any]:
    """What metrics.json holds: split / model / metric / value, n, low, high or reason."""
    described = {
        extractor.name: {
            "sha256": extractor.sha256,
            "leak_suspect": int(extractor.leak_suspect),
            "dim": reference.raw[extractor.name].shape[1],
            "whitened_dim": reference.white(extractor.name).shape[1],
        }
        for extractor in extractors
    }
    return {
        **{
            split: {
                model: {name: metric.as_json() for name, metric in found.items()}
                for model, found in models.items()
            }
            for split, models in tables.items()
        },
        "floors": {name: metric.as_json() for name, metric in floors.items()},
        "nfe": {name: made.nfe for name, made in samples["heldout"].items()},
        "extractors": described,
        "upsampling": "bicubic, antialiased, rounded to uint8, before features",  # images below the data's px
        "gate": {"candidate": candidate, "baseline": BASELINE, "passed": int(passed)},
    }


def summarise(tables: Mapping[str, Mapping[str, Metric]]) -> dict[str, dict[str, float]]:
    """What `dvc metrics show` prints: model / metric / value, without what was refused."""
    shown = ("kid", "recall", "coverage", "top_octave", "retrieval_top1")
    return {
        model: {
            name: value
            for name in shown
            if name in found and (value := metrics.rounded(found[name].value)) is not None
        }
        for model, found in tables.items()
    }


def _speed_line(model: str, split: str, made: Samples) -> str:
    n, rate = len(made.images), len(made.images) / max(made.seconds, 1e-9)
    calls = "call" if made.nfe == 1 else "calls"
    return f"sampled {n} images of {model} on {split} captions, {made.nfe} {calls} each, {rate:.1f} images/s"


def _as_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n"
