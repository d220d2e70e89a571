"""The search for copies of training images (see memorisation.py), planted ones among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import damage
from pipeline.evaluation.conditions import family_of, group_of
from pipeline.evaluation.evidence import Reference
from pipeline.evaluation.memorisation import ALIKE, Neighbours, TrainingImages, thumbnails
from pipeline.evaluation.statistics import Int64, number_families, spaced
from pipeline.models.shape import Images, squashed

MAX_COPIES = 200  # training images that are damaged, to measure how many copies are found
ImageSets = Mapping[str, Mapping[str, Images]]  # uint8, by caption set and contender


@dataclass(frozen=True)
class CopySearch:
    """The nearest training images of all images, and what to compare them with.

    power: share of damaged training images that are found as copies, rho < ALIKE, by the kind of damage; and of
    undamaged ones beside other families, which are none."""

    neighbours: dict[str, dict[str, Neighbours]]
    reference: Reference
    power: dict[str, float]


def search_copies(images: ImageSets, dataset: PreparedDataset, some: Int64) -> CopySearch:
    """Search all training images at once, since their variants cost as much as their distances. The reference
    and the damaged ones are those of `some` rows: of all of them it would cost the square of their number.

    Images of other shapes are stretched to squares, so that all are compared with all."""

    def squares(numbers: Int64) -> Tensor:
        return squashed(dataset.pictures(numbers), dataset.resolution)

    rows, real = dataset.split("train"), squares(some)
    (of_all, of_some), _ = number_families(
        *([family_of(dataset.rows[i]) for i in each] for each in (rows, some))
    )
    training = TrainingImages(lambda numbers: squares(rows[numbers]), of_all)
    planted = plant_copies(real)
    places = [(split, name) for split, by_name in images.items() for name in by_name]
    drawn = (squashed(images[split][name], dataset.resolution) for split, name in places)
    shown = [*drawn, *planted.values(), real]
    sizes = [len(each) for each in shown]
    left_out = np.concatenate([np.full(sum(sizes[:-1]), -1), of_some])
    near = training.nearest(torch.cat([thumbnails(each) for each in shown]), left_out)
    *parts, apart = replace(near, row=rows[near.row]).split(sizes)
    neighbours: dict[str, dict[str, Neighbours]] = {split: {} for split in images}
    for (split, name), each in zip(places, parts[: len(places)], strict=True):
        neighbours[split][name] = each
    power = dict(zip(planted, map(_share_alike, parts[len(places) :]), strict=True))
    groups = np.unique([group_of(dataset.rows[i]) for i in some], return_inverse=True)[1]
    return CopySearch(
        neighbours,
        Reference(apart.rho, of_some, groups),
        power | {"no copies: real images of other families": _share_alike(apart)},
    )


def _share_alike(found: Neighbours) -> float:
    return float((found.rho < ALIKE).mean())


def plant_copies(images: Tensor) -> dict[str, Tensor]:
    """Damaged copies of at most MAX_COPIES of uint8 images [M,3,R,R], by the kind of damage."""
    some = spaced(len(images), MAX_COPIES)
    copies = images[some]
    other = images[np.roll(some, len(some) // 2)].float()
    cases = {f"noise, {std} grey levels": damage.add_noise(copies, std, seed=0) for std in (4, 8, 16)}
    cases |= {f"blur, {px} px": damage.blur(copies, px) for px in (1, 2)}
    cases |= {f"shift, {px} px right and down": damage.shift(copies, px) for px in (1, 2, 3)}
    cases["mixed with 10% of another image"] = (0.9 * copies.float() + 0.1 * other).round().to(torch.uint8)
    return cases
