"""Which images are for training, validation and test: by family, seeded, balanced over families and images."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

SPLITS = ("train", "val", "test")
# What later stages need at least: the evaluation compares distances to two other families of training images, and
# training measures itself on validation images.
MIN_FAMILIES = {"train": 3, "val": 1, "test": 1}
MIN_TRAIN = 8  # training images; the features of fewer say nothing of their spread
# Images and families that a verdict needs: of fewer no distance is measured, or there is no interval of it.
JUDGED = {"train": (50, 50), "test": (50, 20)}


def assign_splits(families: Sequence[str], seed: int, shares: Mapping[str, float]) -> dict[str, str]:
    """Split of each family of images that belong together, given the family of every image.

    Families are taken largest first, so that large ones spread over all splits, and among equals in the order of
    sha256(seed, family). Each goes to the split that lacks most of the families due to it so far. The last families
    go to splits that lack some of MIN_FAMILIES, so that five are enough for all. The result depends on the set of
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
        lacking = {name: least - filled[name] for name, least in MIN_FAMILIES.items() if least > filled[name]}
        scarce = len(sizes) - number <= sum(lacking.values())
        due = number + 1
        split = max(lacking if scarce else SPLITS, key=lambda name: shares[name] * due - filled[name])
        filled[split] += 1
        splits[family] = split
    return splits


def shortage(
    images: Mapping[str, int], families: Mapping[str, int], shares: Mapping[str, float]
) -> tuple[str, str] | None:
    """What is wrong and how to fix it where there are too few images or families for training and evaluation; None
    where there are enough. Given are the numbers of each split, and its share."""
    needed, found = sum(MIN_FAMILIES.values()), sum(families[name] for name in SPLITS)
    if found < needed:
        total = sum(images[name] for name in SPLITS)
        parts = ", ".join(f"{least} {name}" for name, least in MIN_FAMILIES.items())
        problem = f"the splits need {needed} families of images ({parts}), found {found} in {total}"
        return problem, "add images that do not look alike, since those that do are one family"
    if images["train"] < MIN_TRAIN:
        about = math.ceil(MIN_TRAIN / shares["train"])
        problem = f"{images['train']} images are for training, {MIN_TRAIN} are needed"
        fix = (
            f"add images until about {about} families, now {found}, look different, or raise data.split.train"
        )
        return problem, fix
    return None


def hardly_judged(images: Mapping[str, int], families: Mapping[str, int]) -> str:
    """A warning where the evaluation will find too little evidence for a verdict; empty where it may be enough.

    Given are the numbers of each split, of images with captions if any has one."""
    few = [
        f"of {least} {name} images of {of} families it has {images[name]} of {families[name]}"
        for name, (least, of) in JUDGED.items()
        if images[name] < least or families[name] < of
    ]
    fix = "add images, or change data.split" if len(few) == 1 else "add images"
    return f"warning: evaluate will be undecided: {', and '.join(few)}; {fix}" if few else ""
