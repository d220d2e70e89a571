"""What the gate decides from: measurements of every image, in one file.

`evidence.safetensors` holds, for each caption set, the families of the images, the features of the real
images and, for each contender, features, sharpness, caption rank and nearest training families of its images;
and of the training images how alike their families are. The gate (gate.py) is a pure function of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.statistics import Int64

TEACHER, CHAMPION = "finetuned", "champion"  # the contenders that others are compared with


@dataclass(frozen=True)
class Measured:
    """N images of one contender on one caption set."""

    features: dict[str, Float64]  # [N,k], whitened, by extractor
    power: Float64  # [N] of the top octave, see metrics.sharpness
    caption_rank: Float64 | None  # [N] see retrieval.caption_rank; None without captions to tell apart
    rho: Float64  # [N] see memorisation.Neighbours
    distance: Float64  # [N] d1, grey levels


@dataclass(frozen=True)
class Conditions:
    """A caption set: what all contenders drew, and the M real images that they are compared with."""

    families: Int64  # [N] of the captions, numbered together with `real_families`
    groups: Int64  # [N] numbered as in Reference; -1 for a group without training images
    power: Float64  # [N] of the real image of each caption
    real: dict[str, Float64]  # [M,k] features by extractor
    real_families: Int64  # [M]

    @property
    def num_families(self) -> int:
        """Of captions and real images together."""
        return int(max(self.families.max(), self.real_families.max())) + 1


@dataclass(frozen=True)
class Reference:
    """T training images: how near each is to other families (copies.search_copies)."""

    rho: Float64  # [T]
    families: Int64  # [T]
    groups: Int64  # [T]


@dataclass(frozen=True)
class Subject:
    """What was judged: digests of the prepared data and of each model (refined, finetuned, champion), the address
    of the one that they were compared with, and the steps in which the fine-tuned model may stand in."""

    data_digest: str
    models: dict[str, str]
    baseline_address: str
    teacher_steps: int


@dataclass(frozen=True)
class Description:
    """What the numbers are of."""

    seed: int  # of the bootstraps
    extractors: list[str]  # the main one first; none where none qualified
    margins: dict[str, float]  # KID by which a contender may be worse, by extractor, on training captions
    heldout_margins: dict[str, float]  # the same on held-out captions
    floors: dict[str, float]  # half width of the 95% interval between two real sets: by "SPLIT/EXTRACTOR"
    candidates: dict[int, str]  # contender by number of passes
    equal_cost: dict[int, str]  # contender that costs as much, where there is one
    baseline: str  # contender
    nfe: dict[str, int]  # calls per image, by contender
    multiply_adds: dict[str, int]  # of one image
    how: dict[str, str] = field(default_factory=dict)  # settings in words
    not_finite: list[str] = field(default_factory=list)  # contenders with NaN or Inf among their weights
    uncaptioned: dict[str, str] = field(default_factory=dict)  # why captions are not judged, by caption set
    subject: Subject | None = None  # None where the numbers are of no stored model


@dataclass(frozen=True)
class Evidence:
    """Everything that the rules need."""

    description: Description
    conditions: dict[str, Conditions]  # by caption set: "train", "heldout"
    measured: dict[str, dict[str, Measured]]  # by caption set and contender
    reference: Reference

    def save(self, path: Path) -> None:
        """Write the file; equal evidence gives equal bytes."""
        arrays: dict[str, Any] = dict(_flatten(("reference",), asdict(self.reference)))
        for split, conditions in self.conditions.items():
            arrays |= _flatten((split,), asdict(conditions))
            for name, measured in self.measured[split].items():
                arrays |= _flatten((split, "contenders", name), asdict(measured))
        stored = {
            key: np.ascontiguousarray(value, np.float32 if value.dtype.kind == "f" else np.int32)
            for key, value in sorted(arrays.items())
        }
        save_file(stored, path, {"description": json.dumps(asdict(self.description), sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Evidence:
        """The inverse of `save`, up to the rounding to float32."""
        tree: dict[str, Any] = {}
        with safe_open(path, "numpy") as file:
            description = json.loads(file.metadata()["description"])
            for key in file.keys():  # noqa: SIM118  # not a mapping
                array = file.get_tensor(key)
                node = tree
                *parents, last = key.split("/")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        for name in ("candidates", "equal_cost"):
            description[name] = {int(passes): value for passes, value in description[name].items()}
        if description.get("subject"):
            description["subject"] = Subject(**description["subject"])
        reference = Reference(**tree.pop("reference"))
        contenders = {split: node.pop("contenders", {}) for split, node in tree.items()}
        return cls(
            Description(**description),
            {split: Conditions(**{"real": {}, **node}) for split, node in tree.items()},
            {
                split: {
                    name: Measured(**{"features": {}, "caption_rank": None, **each})
                    for name, each in by_name.items()
                }
                for split, by_name in contenders.items()
            },
            reference,
        )


def _flatten(path: tuple[str, ...], tree: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flatten((*path, key), value)
        elif value is not None:
            out["/".join((*path, key))] = value
    return out
