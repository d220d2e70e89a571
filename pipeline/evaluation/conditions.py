"""The captions that models are asked to draw, and the real image of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.config.params import Params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import BadData
from pipeline.evaluation import statistics
from pipeline.evaluation.statistics import Int64


@dataclass(frozen=True)
class CaptionSet:
    """Captions of one split, and the real image of each."""

    split: str  # "heldout" or "train"
    rows: Int64  # [n] of the data set
    captions: list[str]
    caption_ids: list[int]
    bases: list[str]
    images: Tensor  # uint8 [n,3,R,R]
    num_teacher: int  # the slow models get only the first so many captions


def family_of(row: Mapping[str, Any]) -> str:
    """The picture of which a row is a variant."""
    return str(row["base"] or row["id"])


def choose_rows(dataset: PreparedDataset, split: str, limit: int, seed: int) -> Int64:
    """At most `limit` captioned rows of a split, in random order, every base once before any comes twice."""
    rows = [int(row) for row in dataset.split(split) if dataset.caption_of(int(row)) >= 0]
    order = statistics.generator(seed, f"captions/{split}").permutation(len(rows))
    seen: dict[str, int] = {}
    ranked = []
    for position, i in enumerate(order):
        base = family_of(dataset.rows[rows[i]])
        ranked.append((seen.get(base, 0), position, rows[i]))
        seen[base] = seen.get(base, 0) + 1
    return np.array([row for _, _, row in sorted(ranked)[:limit]], dtype=np.int64)


def build_caption_set(
    dataset: PreparedDataset, name: str, split: str, limit: int, num_teacher: int, seed: int
) -> CaptionSet:
    """See Condition."""
    rows = choose_rows(dataset, split, limit, seed)
    ids = [dataset.caption_of(int(row)) for row in rows]
    bases = [family_of(dataset.rows[row]) for row in rows]
    captions = [dataset.captions[i] for i in ids]
    return CaptionSet(name, rows, captions, ids, bases, dataset.images(rows), min(num_teacher, len(rows)))


def build_caption_sets(dataset: PreparedDataset, params: Params) -> list[CaptionSet]:
    """Held-out captions, then training captions (unless evaluate.train_captions is 0)."""
    budget = params.evaluate
    where, fix = str(dataset.path), "add images with captions, or change data.* in params.yaml"
    limit = budget.heldout_captions
    conditions = [build_caption_set(dataset, "heldout", "test", limit, limit, params.seed)]
    if not len(conditions[0].rows):
        raise BadData("E-DAT-050", where, "no image of the test split has a caption", fix)
    if len(dataset.split("train")) < 8:
        raise BadData("E-DAT-051", where, f"has {len(dataset.split('train'))} training images, needs 8", fix)
    train = build_caption_set(
        dataset, "train", "train", budget.train_captions, budget.teacher_train_captions, params.seed
    )
    return conditions + ([train] if len(train.rows) else [])
