"""Which images are for training, validation and test: by family, seeded, balanced over images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

FRACTIONS = {"train": 0.85, "val": 0.05, "test": 0.10}


def assign_splits(families: Sequence[str], seed: int) -> dict[str, str]:
    """Split of each family of images that belong together, given the family of every image.

    Families are taken largest first, so that small ones even out the fractions, and among equals in the order of
    sha256(seed, family). Each goes to the split that lacks most images of those due so far. The result depends
    on the set of families and the seed, not on the order of `families`.
    """
    sizes = Counter(families)

    def turn(family: str) -> tuple[int, bytes]:
        return -sizes[family], hashlib.sha256(f"{seed}:{family}".encode("utf-8", "surrogateescape")).digest()

    filled = dict.fromkeys(FRACTIONS, 0)
    splits: dict[str, str] = {}
    due = 0
    for family in sorted(sizes, key=turn):
        due += sizes[family]
        split = max(FRACTIONS, key=lambda name: FRACTIONS[name] * due - filled[name])
        filled[split] += sizes[family]
        splits[family] = split
    return splits
