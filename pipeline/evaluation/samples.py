"""Sampling the models that are compared, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.adversarial.few_step import generate_images
from pipeline.config.params import Params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import metrics
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.features import to_resolution
from pipeline.evaluation.statistics import Int64
from pipeline.models.snapshot import Snapshot, at_resolution, load_snapshot
from pipeline.rng import key

BASELINE = "finetuned"


@dataclass(frozen=True)
class Model:
    """A snapshot and how it is sampled: `num_steps` passes of a refined model; None for its own default."""

    name: str
    snapshot: Snapshot
    num_steps: int | None
    slow: bool  # draws fewer captions and samples, since it needs many calls per image


@dataclass(frozen=True)
class Samples:
    """Images of one model for one caption set; image i shows caption which[i], as its draw[i]-th sample."""

    native: Tensor  # uint8 [N,3,r,r], as sampled
    images: Tensor  # uint8 [N,3,R,R], as compared
    which: Int64
    draw: Int64
    nfe: int
    compute_fraction: float  # fraction of the finest level's computation that was needed
    seconds: float


def sample(model: Model, caption_set: CaptionSet, dataset: PreparedDataset, params: Params) -> Samples:
    """Sample a caption set. Seeds depend on caption and draw alone, so that models are compared in pairs."""
    budget = params.evaluate
    num_captions = caption_set.num_teacher if model.slow else len(caption_set.rows)
    draws = 1
    if caption_set.split == "heldout":
        draws = budget.teacher_samples_per_caption if model.slow else budget.samples_per_caption
    draw, which = (grid.ravel() for grid in np.mgrid[:draws, :num_captions])
    seeds = [
        key(params.seed, f"evaluate/{caption_set.captions[i]}", int(j))
        for i, j in zip(which, draw, strict=True)
    ]
    text = dataset.text([caption_set.caption_ids[i] for i in which])
    start = time.perf_counter()
    result = generate_images(
        model.snapshot, text, seeds, passes=model.num_steps, batch_size=budget.batch_size
    )
    seconds = time.perf_counter() - start
    images = to_resolution(result.images, dataset.resolution)
    return Samples(result.images, images, which, draw, result.nfe, result.compute_fraction, seconds)


def sample_all(
    models: Sequence[Model],
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
    params: Params,
    log: Callable[[str], None],
) -> tuple[dict[str, dict[str, Samples]], dict[str, Any]]:
    """Samples by split and model, and the content of throughput.json; the first caption set is the held-out one."""
    samples: dict[str, dict[str, Samples]] = {}
    throughput: dict[str, Any] = {}
    for caption_set in caption_sets:
        split = caption_set.split
        samples[split] = {}
        for model in models:
            result = sample(model, caption_set, dataset, params)
            samples[split][model.name] = result
            throughput[f"{split}/{model.name}"] = speed(
                len(result.images), result.nfe, result.compute_fraction, result.seconds
            )
            log(_describe(model.name, split, result))
    for model in models:
        if not model.slow:
            throughput[f"one_image/{model.name}"] = latency(model, dataset, caption_sets[0])
    return samples, throughput


def _describe(model: str, split: str, samples: Samples) -> str:
    n, rate = len(samples.images), len(samples.images) / max(samples.seconds, 1e-9)
    calls = "call" if samples.nfe == 1 else "calls"
    return (
        f"sampled {n} images of {model} on {split} captions, {samples.nfe} {calls} each, {rate:.1f} images/s"
    )


def latency(
    model: Model, dataset: PreparedDataset, caption_set: CaptionSet, repeats: int = 5
) -> dict[str, Any]:
    """Speed of a single image: the median of `repeats`, after one to warm up."""
    text = dataset.text(caption_set.caption_ids[:1])
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        result = generate_images(model.snapshot, text, [i], passes=model.num_steps)
        seconds.append(time.perf_counter() - start)
    return speed(1, result.nfe, result.compute_fraction, float(np.median(seconds[1:])))


def speed(images: int, nfe: int, compute_fraction: float, seconds: float) -> dict[str, Any]:
    """One entry of throughput.json."""
    each = max(seconds, 1e-9) / images
    return {
        "images": images,
        "nfe": nfe,
        "share": round(compute_fraction, 3),
        "seconds": round(seconds, 3),
        "seconds_per_image": metrics.rounded(each),
        "images_per_second": round(1 / each, 2),
    }


def load_models(folder: Path, params: Params, device: str) -> list[Model]:
    """The core of the fine-tuned model, the fine-tuned model, and the refined one with each number of passes, in
    ascending order."""
    refined, finetuned = (load_snapshot(folder / name, device) for name in ("refined", "finetuned"))
    core = at_resolution(finetuned, finetuned.config.core.resolution)
    return [
        Model("core", core, None, slow=True),
        Model(BASELINE, finetuned, None, slow=True),
        *(Model(f"refined_{n}", refined, n, slow=False) for n in sorted(params.evaluate.num_passes)),
    ]
