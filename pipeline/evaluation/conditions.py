"""The captions that are drawn, the real image of each, and how many images of each.

All contenders draw the same captions with the same seeds, so that they are compared in pairs. A split of which no
image has a caption is drawn without captions: as many images beside its real ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.dataset import PreparedDataset
from pipeline.errors import BadData
from pipeline.evaluation import statistics
from pipeline.evaluation.statistics import Int64
from pipeline.models.shape import Images
from pipeline.rng import key

SPLITS = {"heldout": "test", "train": "train"}  # caption sets, and the splits that they come from
MIN_TRAIN, MIN_FAMILIES = 8, 3  # training images, and families of them: rho compares two other families
NO_CAPTION = "no caption"


@dataclass(frozen=True)
class CaptionSet:
    """Captions of one split, the real image of each, and the images to draw: image i shows caption which[i].

    Where the split has no captions, they are NO_CAPTION, with an id of -1."""

    split: str  # "heldout" or "train"
    rows: Int64  # [n] of the data set
    captions: list[str]
    caption_ids: list[int]
    families: list[str]
    groups: list[str]
    images: Images  # uint8 [3,H,W] each
    which: Int64  # [N]
    draw: Int64  # [N] number of the image among those of equal captions

    def seeds(self, seed: int, purpose: str = "evaluate") -> list[int]:
        """A seed per image, of caption and draw alone. Without captions, sets have seeds of their own."""
        pairs = zip(self.which, self.draw, strict=True)
        texts = [
            text if number >= 0 else f"{text}, {self.split}"
            for text, number in zip(self.captions, self.caption_ids, strict=True)
        ]
        return [key(seed, f"{purpose}/{texts[i]}", int(j)) for i, j in pairs]

    @property
    def is_captioned(self) -> bool:
        """Whether its images have captions: all of them, or none."""
        return self.caption_ids[0] >= 0

    @property
    def uncaptioned_because(self) -> str:
        """Why nothing can be said of how images follow captions; empty where something can."""
        if not self.is_captioned:
            return f"no image of the {SPLITS[self.split]} split has a caption"
        alike = len(self.captions) > 1 and len(set(self.captions)) == 1
        return f"all images have one caption, {self.captions[0][:80]!r}" if alike else ""


def family_of(row: Mapping[str, Any]) -> str:
    """Name of the family of a row: the image of which it is a variant, or its own id."""
    return str(row["base"] or row["id"])


def group_of(row: Mapping[str, Any]) -> str:
    """The finest group that the source names for a row; empty if none."""
    return str(row.get("subgroup") or row.get("group") or "")


def choose_rows(dataset: PreparedDataset, split: str, limit: int, seed: int) -> Int64:
    """At most `limit` captioned rows of a split, or any rows where none is captioned, in random order, every family
    once before any comes twice."""
    every = [int(row) for row in dataset.split(split)]
    rows = [row for row in every if dataset.caption_of(row) >= 0] or every
    order = statistics.generator(seed, f"captions/{split}").permutation(len(rows))
    seen: dict[str, int] = {}
    ranked = []
    for position, i in enumerate(order):
        family = family_of(dataset.rows[rows[i]])
        ranked.append((seen.get(family, 0), position, rows[i]))
        seen[family] = seen.get(family, 0) + 1
    return np.array([row for _, _, row in sorted(ranked)[:limit]], dtype=np.int64)


def build_caption_set(
    dataset: PreparedDataset, name: str, split: str, count: int, seed: int, limit: int | None = None
) -> CaptionSet:
    """The caption set `name` with `count` images to draw, of `choose_rows` of `split` (at most `limit`
    captions): each caption once before any is drawn again."""
    rows = choose_rows(dataset, split, count if limit is None else min(count, limit), seed)
    ids = [dataset.caption_of(int(row)) for row in rows]
    which = np.arange(count if len(rows) else 0, dtype=np.int64) % max(len(rows), 1)
    captions = [dataset.captions[i] if i >= 0 else NO_CAPTION for i in ids]
    return CaptionSet(
        split=name,
        rows=rows,
        captions=captions,
        caption_ids=ids,
        families=[family_of(dataset.rows[row]) for row in rows],
        groups=[group_of(dataset.rows[row]) for row in rows],
        images=dataset.pictures(rows),
        which=which,
        draw=number_repeats([captions[i] for i in which]),
    )


def number_repeats(texts: Sequence[str]) -> Int64:
    """How often each text [N] came before: int64 [N]."""
    before: Counter[str] = Counter()
    draw = []
    for text in texts:
        draw.append(before[text])
        before[text] += 1
    return np.array(draw, dtype=np.int64)


@dataclass(frozen=True)
class SampleCount:
    """Images per contender and caption set: what the precision asks for, and what the budget of calls
    allows."""

    wanted: int
    affordable: int

    @property
    def count(self) -> int:
        """The smaller one."""
        return min(self.wanted, self.affordable)

    def note(self) -> str:
        """Why there are not as many as wanted; empty if there are."""
        if self.affordable >= self.wanted:
            return ""
        return (
            f"evaluate.max_calls allows {self.affordable} images per model and caption set, "
            f"promotion.precision asks for {self.wanted}"
        )


def wanted_samples(precision: float) -> int:
    """Images for which the 95% interval of a share, at worst (a half), has the half width `precision` if all were
    independent: n = (0.98 / precision)^2."""
    return math.ceil((0.98 / precision) ** 2)


def plan_samples(precision: float, max_calls: int, calls_per_image: int) -> SampleCount:
    """How many images each contender draws of each of the two caption sets.

    calls_per_image: of all contenders together. Depends on counts alone, never on time."""
    return SampleCount(wanted_samples(precision), max(max_calls // (len(SPLITS) * calls_per_image), 1))


def build_caption_sets(dataset: PreparedDataset, count: int, seed: int) -> list[CaptionSet]:
    """Held-out captions and training captions, `count` images of each."""
    return [build_caption_set(dataset, name, split, count, seed) for name, split in SPLITS.items()]


def check_images(dataset: PreparedDataset) -> None:
    """Raise BadData where there are no test images, or fewer than MIN_TRAIN images of MIN_FAMILIES to train on. The
    prepare stage asks for as many; data may be older."""
    where, fix = dataset.where, "add images, and run `dvc repro prepare`"
    if not len(dataset.split("test")):
        raise BadData("E-DAT-050", where, "no image is in the test split", fix)
    train = dataset.split("train")
    families = len({family_of(dataset.rows[row]) for row in train})
    if len(train) < MIN_TRAIN or families < MIN_FAMILIES:
        problem = (
            f"has {len(train)} training images of {families} families, needs {MIN_TRAIN} of {MIN_FAMILIES}"
        )
        raise BadData("E-DAT-051", where, problem, fix)
