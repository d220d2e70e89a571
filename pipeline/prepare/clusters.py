"""Families whose images look alike, joined: a picture and its near duplicate must not be in two splits.

Two images look alike if their box means at 16 px differ by little (RMS, in grey levels and as a fraction of their
contrast), as they are or mirrored. Pairs to compare are found by locality-sensitive hashing with random projections
(Datar et al. 2004, https://doi.org/10.1145/997817.997857), so that time and memory grow linearly with the number of
images. All arithmetic is on integers, or on floats that hold them exactly: every machine finds the same pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 16  # px of the box means, or the core's resolution where that is less
MAX_RMS = 8  # grey levels between two images that look alike
MAX_PART = 4  # and at most a 4th of the standard deviation of either
BANDS, KEYS = 8, 5  # hash tables, and projections whose cells make up a key of one
CELL = 48  # width of a cell, grey levels (RMS)
WINDOW = 32  # images of one key that an image is compared with, a table
TOGETHER = 2**14  # images that are compared in one go
SUMMED = 64  # images whose means are computed in one go
_CELL_BITS = 10  # of the number of a cell, which lies in -148 ... 147 with SIDE and CELL as they are

Means = NDArray[np.uint8]
Pairs = NDArray[np.int64]


class Clusters(NamedTuple):
    """Families after those that look alike were joined.

    names: of each image, the first family of its cluster.
    families: number of families before.
    largest: number of families in the largest cluster, and its name.
    """

    names: list[str]
    families: int
    largest: tuple[int, str]

    def summary(self) -> dict[str, int | str]:
        """What metrics.json says of them."""
        count, name = self.largest
        joined = self.families - len(set(self.names))
        return {"families": self.families, "joined": joined, "largest": count, "largest_name": name}


def join_similar(
    families: Sequence[str], sums: Iterable[NDArray[np.uint16]], resolution: int, factor: int
) -> Clusters:
    """Join all families of which two images look alike.

    Args:
        families: of each image.
        sums: of each image of `resolution` px over boxes of `factor` px, uint16 [3, h, w] (`shards.box_sums`).
    """
    first: dict[str, int] = {}
    numbers = np.array([first.setdefault(name, len(first)) for name in families], np.int64)
    means = box_means(sums, factor, min(resolution // factor, SIDE), len(families))
    pairs = numbers[similar_pairs(means, numbers)]
    of_family = connected(len(first), pairs)
    names = list(first)
    sizes = Counter(of_family)
    largest = max(sizes, key=lambda number: (sizes[number], -number), default=0)
    return Clusters(
        [names[of_family[number]] for number in numbers],
        len(names),
        (sizes[largest], names[largest]) if names else (0, ""),
    )


def connected(count: int, pairs: Pairs | Sequence[tuple[int, int]]) -> list[int]:
    """The first of all numbers below `count` that are connected with each number by `pairs`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.asarray(pairs, np.int64).reshape(-1, 2)
    ones = np.ones(len(ends), np.int8)
    _, labels = connected_components(coo_array((ones, ends.T), (count, count)), directed=False)
    _, first, label = np.unique(labels, return_index=True, return_inverse=True)
    members: list[int] = first[label].tolist()
    return members


def box_means(sums: Iterable[NDArray[np.uint16]], factor: int, side: int, count: int) -> Means:
    """Means of `side` x `side` equal parts of `count` images from their sums over boxes of `factor` px, rounded:
    uint8 [n, 3, side, side]. Where a side of an image is no multiple of `side` boxes, boxes count in proportion."""
    means = np.zeros((count, 3, side, side), np.uint8)
    for (_, (_, height, width)), run in groupby(
        enumerate(sums), lambda pair: (pair[0] // SUMMED, pair[1].shape)
    ):
        numbers, some = zip(*run, strict=True)
        down, across = math.lcm(height, side), math.lcm(width, side)
        boxes = np.stack(some).repeat(down // height, 2).repeat(across // width, 3)
        total = _every(_every(boxes, 2, down // side), 3, across // side)
        pixels = down // side * (across // side) * factor**2  # of a part of the image
        means[numbers[0] : numbers[-1] + 1] = (2 * total + pixels) // (2 * pixels)
    return means


def _every(values: NDArray[Any], axis: int, count: int) -> NDArray[np.uint32]:
    """Sums of `count` values each along an axis; whole slices are added, far faster than short rows are summed."""
    parts = np.moveaxis(values, axis, 0)
    total = parts[::count].astype(np.uint32)
    for number in range(1, count):
        total += parts[number::count]
    return np.moveaxis(total, 0, axis)


def similar_pairs(means: Means, families: NDArray[np.int64]) -> Pairs:
    """Pairs of images of different families that look alike, [m, 2]; of large groups not all pairs.

    Args:
        means: box means, uint8 [n, 3, s, s].
        families: of each image, [n].
    """
    found = [_alike(means, pairs) for pairs in _candidates(means, families)]
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), np.int64)


def _candidates(means: Means, families: NDArray[np.int64]) -> Iterator[Pairs]:
    """Pairs of different families with a key in common, at most TOGETHER each.

    Images of one key are sorted by another projection, and those at most WINDOW places apart are paired.
    """
    sketches = _project(means)
    cell = CELL * math.isqrt(means[0].size) if len(means) else 1
    for band in range(BANDS):
        line, *keyed = sketches[:, band * (KEYS + 1) : (band + 1) * (KEYS + 1)].T
        cells = np.zeros(len(line), np.int64)
        for values in keyed:
            cells = (cells << _CELL_BITS) + values // cell
        order = np.lexsort((line, cells))
        sorted_cells, own = cells[order], families[order]
        for step in range(1, min(WINDOW, len(order) - 1) + 1):
            same = sorted_cells[step:] == sorted_cells[:-step]
            if not same.any():
                break
            start = np.flatnonzero(same & (own[step:] != own[:-step]))
            pairs = np.sort(np.stack([order[start], order[start + step]], 1), axis=1)
            for i in range(0, len(pairs), TOGETHER):
                yield _near(sketches, pairs[i : i + TOGETHER], means[0].size)


def _near(sketches: NDArray[np.int32], pairs: Pairs, size: int) -> Pairs:
    """Those of `pairs` whose projections are near enough, so that few that do not look alike are compared in full.

    The mean square of the projections of a difference estimates its sum of squares, or twice that where the
    difference is symmetric. The limit is twice as high again: fewer than 1 of 1,000 pairs that look alike is lost.
    """
    apart = (sketches[pairs[:, 0]] - sketches[pairs[:, 1]]).astype(np.float64)
    return pairs[(apart**2).mean(1) <= 4 * MAX_RMS**2 * size]


def _project(means: Means) -> NDArray[np.int32]:
    """Projections of each image on random signs, [n, BANDS * (KEYS + 1)]; the mirrored image has the same.

    Their sums, below 2^24, are exact in float32 in any order.
    """
    count, channels, side, _ = means.shape
    half, wanted = max(side // 2, 1), BANDS * (KEYS + 1)
    stream = hashlib.shake_256(b"near duplicates").digest(-(-wanted * channels * side * half // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[: wanted * channels * side * half]
    left = bits.reshape(wanted, channels, side, half)
    signs = np.concatenate([left, left[..., ::-1]], -1)[..., :side].reshape(wanted, -1) * np.float32(2) - 1
    projected = np.zeros((count, wanted), np.int32)
    for i in range(0, count, TOGETHER):
        some = means[i : i + TOGETHER].reshape(-1, signs.shape[1]).astype(np.float32)
        projected[i : i + TOGETHER] = some @ signs.T
    return projected


def _alike(means: Means, pairs: Pairs) -> Pairs:
    """Those of `pairs` of images that look alike, as they are or mirrored."""
    a, b = (means[pairs[:, side]].astype(np.int32) for side in (0, 1))
    size = means[0].size
    least = np.minimum(*(_spread(each) for each in (a, b)))  # size^2 times the variance
    apart = np.minimum(*(((a - other) ** 2).sum((1, 2, 3), dtype=np.int64) for other in (b, b[..., ::-1])))
    return pairs[(apart <= MAX_RMS**2 * size) & (apart * size * MAX_PART**2 <= least)]


def _spread(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """Squared size times the mean variance of the channels, [n, 3, s, s] to [n]."""
    area = values.shape[2] * values.shape[3]
    squares = (values**2).sum((2, 3), dtype=np.int64)
    return 3 * (area * squares - values.sum((2, 3), dtype=np.int64) ** 2).sum(1)
