"""Which images are for training, validation and test: by family, seeded, balanced over families and images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

SPLITS = ("train", "val", "test")


def assign_splits(families: Sequence[str], seed: int, shares: Mapping[str, float]) -> dict[str, str]:
    """Split of each family of images that belong together, given the family of every image.

    Families are taken largest first, so that large ones spread over all splits, and among equals in the order of
    sha256(seed, family). Each goes to the split that lacks most of the families due to it so far. The last families
    go to splits that have none, so that each split has one if there are three. The result depends on the set of
    families and the seed, not on the order of `families`.

    Args:
        shares: fraction of the families that is due to each of `SPLITS`; the sum is 1.
    """
    sizes = Counter(families)

    def turn(family: str) -> tuple[int, bytes]:
        return -sizes[family], hashlib.sha256(f"{seed}:{family}".encode("utf-8", "surrogateescape")).digest()

    filled = dict.fromkeys(SPLITS, 0)
    splits: dict[str, str] = {}
    for number, family in enumerate(sorted(sizes, key=turn)):
        empty = [name for name in SPLITS if not filled[name]]
        scarce = len(sizes) - number <= len(empty)
        due = number + 1
        split = max(empty if scarce else SPLITS, key=lambda name: shares[name] * due - filled[name])
        filled[split] += 1
        splits[family] = split
    return splits
