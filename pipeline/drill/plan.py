"""How large a drill is, and when it kills: at random moments, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.rng import key

STAGES = ("pretrain", "finetune", "refine")
BATCHES = 24  # of a run, or of a round of it
CHECKPOINT = 4  # batches between checkpoints
SAMPLES = 8  # images that the guards of refine measure
AT_START = 0.2  # fraction of the kills before the first batch


def scaled(tree: Mapping[str, Any], stage: str, batches: int = BATCHES) -> dict[str, Any]:
    """params.yaml (plain values) with the stage at the scale of a drill: a record of each batch, no judge.

    Networks, batches, shards and data stay as they are. A pinned model is not grown; models/core is."""
    section = tree[stage]
    batch = section["batch_size"]
    images = {
        "num_images": batches * batch,
        "warmup_images": min(section["warmup_images"], batches * batch // 4),
        "checkpoint_images": CHECKPOINT * batch,
        "log_images": batch,
        "sample_images": batches * batch // 2,
    }
    if section.get("core_images"):
        images["core_images"] = batches * batch
    if "ema_snapshots" in section:
        images["ema_snapshots"] = min(section["ema_snapshots"], batches)
    if "early_images" in section:
        images["early_images"] = min(section["early_images"], batches * batch // 2)
    if "check_images" in section:
        images |= {
            "check_images": batches * batch // 3,
            "check_samples": min(section["check_samples"], SAMPLES),
        }
    changed = {
        **tree,
        stage: {**section, **images},
        "evaluate": {**tree["evaluate"], "watch_images": dict.fromkeys(STAGES, 0)},
    }
    changed["finetune"] = {**changed["finetune"], "init_from": "models/core", "init_sha256": ""}
    return changed


@dataclass(frozen=True)
class Kill:
    """One kill: once the record of image number `image` is written (0: as the process starts), after a fraction
    `wait` of the time of a checkpoint interval (of the start). chance: in [0, 1), chooses the process."""

    image: int
    wait: float
    chance: float


def planned(stage: str, kills: int, seed: int, records: list[int]) -> list[Kill]:
    """The kills of a drill, in order; `records` are the image numbers of the records of a run."""
    draw = random.Random(key(seed, f"drill-{stage}"))
    early = sum(draw.random() < AT_START for _ in range(kills))
    images = sorted(draw.choice(records) for _ in range(kills - early))
    for _ in range(early):
        images.insert(draw.randint(0, len(images)), 0)
    return [Kill(image, draw.random(), draw.random()) for image in images]
