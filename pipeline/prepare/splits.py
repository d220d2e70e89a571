"""Which images are for training, validation and test: by family, seeded, balanced over images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

FRACTIONS = {"train": 0.85, "val": 0.05, "test": 0.10}


def assign_splits(bases: Sequence[str], seed: int) -> dict[str, str]:
    """Split of each base (family of images that belong together), given every image's base.

    Families are taken largest first, so that the small ones even out the shares, and among equals in
    the order of sha256(seed, base); each goes where most is missing of the shares due so far. The
    result depends on the set of families and the seed, not on the order of `bases`.
    """
    sizes = Counter(bases)

    def turn(base: str) -> tuple[int, bytes]:
        return -sizes[base], hashlib.sha256(f"{seed}:{base}".encode("utf-8", "surrogateescape")).digest()

    filled = dict.fromkeys(FRACTIONS, 0)
    splits: dict[str, str] = {}
    due = 0
    for base in sorted(sizes, key=turn):
        due += sizes[base]
        split = max(FRACTIONS, key=lambda name: FRACTIONS[name] * due - filled[name])
        filled[split] += sizes[base]
        splits[base] = split
    return splits
