"""The captions that models draw, and the real image of each."""

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
    families: list[str]
    images: Tensor  # uint8 [n,3,R,R]
    num_teacher: int  # number of captions, the first ones, that the slow models draw


def family_of(row: Mapping[str, Any]) -> str:
    """Name of the family of a row: the image of which it is a variant, or its own id."""
    return str(row["base"] or row["id"])


def choose_rows(dataset: PreparedDataset, split: str, limit: int, seed: int) -> Int64:
    """At most `limit` captioned rows of a split, in random order, every family once before any comes twice."""
    rows = [int(row) for row in dataset.split(split) if dataset.caption_of(int(row)) >= 0]
    order = statistics.generator(seed, f"captions/{split}").permutation(len(rows))
    seen: dict[str, int] = {}
    ranked = []
    for position, i in enumerate(order):
        family = family_of(dataset.rows[rows[i]])
        ranked.append((seen.get(family, 0), position, rows[i]))
        seen[family] = seen.get(family, 0) + 1
    return np.array([row for _, _, row in sorted(ranked)[:limit]], dtype=np.int64)


def build_caption_set(
    dataset: PreparedDataset, name: str, split: str, limit: int, num_teacher: int, seed: int
) -> CaptionSet:
    """The caption set `name`: at most `limit` captions of `split`, chosen by `choose_rows`."""
    rows = choose_rows(dataset, split, limit, seed)
    ids = [dataset.caption_of(int(row)) for row in rows]
    families = [family_of(dataset.rows[row]) for row in rows]
    captions = [dataset.captions[i] for i in ids]
    return CaptionSet(name, rows, captions, ids, families, dataset.images(rows), min(num_teacher, len(rows)))


def build_caption_sets(dataset: PreparedDataset, params: Params) -> list[CaptionSet]:
    """Held-out captions, then training captions (unless evaluate.train_captions is 0)."""
    budget = params.evaluate
    where, fix = str(dataset.path), "add images with captions, or change data.* in params.yaml"
    limit = budget.heldout_captions
    caption_sets = [build_caption_set(dataset, "heldout", "test", limit, limit, params.seed)]
    if not len(caption_sets[0].rows):
        raise BadData("E-DAT-050", where, "no image of the test split has a caption", fix)
    if len(dataset.split("train")) < 8:
        raise BadData("E-DAT-051", where, f"has {len(dataset.split('train'))} training images, needs 8", fix)
    train = build_caption_set(
        dataset, "train", "train", budget.train_captions, budget.teacher_train_captions, params.seed
    )
    return caption_sets + ([train] if len(train.rows) else [])
