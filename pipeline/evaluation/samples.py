"""Sampling the models that are compared, and how long it took."""

from __future__ import annotations

import time
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


def sample(model: Model, condition: CaptionSet, dataset: PreparedDataset, params: Params) -> Samples:
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
    made = generate_images(
        model.snapshot, text, seeds, num_steps=model.num_steps, batch_size=budget.batch_size
    )
    seconds = time.perf_counter() - start
    images = to_resolution(made.images, dataset.resolution)
    return Samples(made.images, images, which, draw, made.nfe, made.share, seconds)


def latency(
    model: Model, dataset: PreparedDataset, condition: CaptionSet, repeats: int = 5
) -> dict[str, Any]:
    """Speed of one image alone, as the median of some."""
    text = dataset.text(condition.caption_ids[:1])
    taken = []
    for i in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        made = generate_images(model.snapshot, text, [i], num_steps=model.num_steps)
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


def _speed_line(model: str, split: str, made: Samples) -> str:
    n, rate = len(made.images), len(made.images) / max(made.seconds, 1e-9)
    calls = "call" if made.nfe == 1 else "calls"
    return f"sampled {n} images of {model} on {split} captions, {made.nfe} {calls} each, {rate:.1f} images/s"
