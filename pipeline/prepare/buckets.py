"""Buckets: the few sizes in which images of many shapes are stored (`data.fit: buckets`).

An image goes to the size nearest its own shape, and a batch holds images of one size (aspect-ratio bucketing,
published by NovelAI in 2022). Sides are multiples of a step, since networks halve them; areas are near that of a
square of the resolution, so that an image costs about the same in any bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np

from pipeline.data.storage import Bucket
from pipeline.prepare.disk_list import DiskList
from pipeline.prepare.framing import Size
from pipeline.prepare.ingest import IngestedItem
from pipeline.prepare.sources.source import Item

TakeIn = Callable[[Sequence[Item], tuple[Size, ...]], Sequence[IngestedItem]]
MAX_ASPECT = 3.0  # of a bucket; a longer image is cropped
MAX_BUCKETS = 8  # torch.compile makes a network for each, and no more of one function
MIN_SHARE, MIN_IMAGES = 0.02, 8  # of all images, in a bucket: its batches hold no others


def candidate_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All (width, height) that a bucket may have, from the square one to the longest, wide before tall.

    A longer side of n steps goes with the shorter one that brings the area nearest to `resolution`^2."""
    cells = resolution // step
    sizes = [(resolution, resolution)]
    for long in range(cells + 1, 2 * cells):
        short = min(range(1, cells + 1), key=lambda n: abs(np.log(long * n / cells**2)))
        if long <= MAX_ASPECT * short:
            sizes += [(long * step, short * step), (short * step, long * step)]
    return tuple(sizes)


def choose_sizes(candidates: tuple[Size, ...], files: Iterable[Size]) -> tuple[Size, ...]:
    """Those of `candidates` that files of these sizes need: the one with the fewest images is given up, and its
    images go to the nearest left, until no more than MAX_BUCKETS are left and all have enough images."""
    counted = Counter(files)
    sizes, counts = np.array(list(counted)).reshape(-1, 2), np.array(list(counted.values()))
    enough = max(MIN_SHARE * counts.sum(), MIN_IMAGES)
    kept = list(candidates)
    while True:
        targets = np.array(kept)
        across, down = sizes[:, :1] * targets[:, 1], sizes[:, 1:] * targets[:, 0]  # as `framing.elongation`
        nearest = (np.maximum(across, down) / np.minimum(across, down)).argmin(1)
        held = np.bincount(nearest, counts, len(kept))
        least = len(kept) - 1 - int(held[::-1].argmin())
        if len(kept) == 1 or (len(kept) <= MAX_BUCKETS and held[least] >= enough):
            return tuple(kept)
        del kept[least]


def in_buckets(
    take_in: TakeIn, items: Sequence[Item], candidates: tuple[Size, ...]
) -> Sequence[IngestedItem]:
    """`take_in(items, candidates)`, and then again, for the sizes that are kept, those items whose size is not."""
    ingested = take_in(items, candidates)
    kept = choose_sizes(candidates, (each.measured[1:3] for each in ingested if each.measured))
    lost = {each.item.id: each.item for each in ingested if each.measured and each.size not in kept}
    moved = {each.item.id: each for each in take_in(list(lost.values()), kept)} if lost else {}
    return DiskList(moved.get(each.item.id, each) for each in ingested)


def buckets_of(sizes: Iterable[Size]) -> tuple[Bucket, ...]:
    """Runs of equal (width, height)."""
    return tuple(Bucket(height, width, sum(1 for _ in run)) for (width, height), run in groupby(sizes))
