"""Continuing from a run of another length.

Until its rate decays, a run makes the same updates as one of any other length: all else that happens in training is
a function of the images seen. So a run may begin with a checkpoint of another one, from before both decay, and
ends with the bits that it would have had from scratch. Of a stage of several rounds, only the first one can be
shared, as a whole where it has the same length, since the others go on from its result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import Busy, StorageError
from pipeline.tracking.stage_run import LEASE
from pipeline.training.records import read_records
from pipeline.training.schedule import before_decay, due, moments_of

RECORDS = ("progress.jsonl", "watch/scores.jsonl")
PICTURES = ("samples/nimg-*.png", "watch/rows/nimg-*.png")


def continue_from(
    other: Path, run_dir: Path, before: Mapping[str, Any], section: Mapping[str, Any]
) -> int | None:
    """Copy the newest checkpoint that both runs share, with what led to it, from `other` to a run that has not
    begun; its nimg, or None if there is none, or the other run is being trained.

    before, section: the stage's parameters in the other run, and in this one, which differ in lengths only."""
    if bool(before.get("core_images")) != bool(section.get("core_images")):
        return None  # they begin with another level
    lengths, totals = ([length(each) for each in (before, section)] for length in (_first_length, _length))
    try:
        with artifacts.lease(other / LEASE):
            rounds = [path.parent for path in other.glob("to-*/checkpoints")]
            first = min(rounds, key=lambda path: int(path.name.removeprefix("to-")), default=other)
            checkpoint = _newest_shared(first, section, lengths)
            if checkpoint is None:
                return None
            nimg = int(checkpoint.name[-12:])
            averages = [first.glob(f"averages*/nimg-{m:012d}") for m in _moments(section, lengths[1], nimg)]
            _copy_records(other, run_dir, nimg, totals)
            # The checkpoint last: with it the run has begun.
            for path in [*(each for found in averages for each in found), checkpoint]:
                artifacts.copy_into_place(path, run_dir / path.relative_to(other), alone=True)
            return nimg
    except Busy:
        return None


def _first_length(section: Mapping[str, Any]) -> int:
    """Training images of the first round."""
    return int(section.get("core_images") or section["num_images"])


def _length(section: Mapping[str, Any]) -> int:
    """Training images of all rounds, or of one of several equal ones."""
    return int(section.get("core_images", 0)) + int(section["num_images"])


def _newest_shared(folder: Path, section: Mapping[str, Any], lengths: Sequence[int]) -> Path | None:
    """The newest checkpoint of a round that runs of these lengths share, and that verifies."""
    for path in sorted(folder.glob("checkpoints/nimg-????????????"), reverse=True):
        nimg, batch_size = int(path.name[-12:]), int(section["batch_size"])
        if not due(nimg, int(section["checkpoint_images"]), batch_size):
            continue  # written as the run was stopped; an unbroken one would not have it to go back to
        moments = _moments(section, lengths[1], nimg)
        stored = set(_moments(section, lengths[0], nimg))
        shared = lengths[0] == lengths[1] or all(before_decay(nimg, batch_size, each) for each in lengths)
        if shared and stored.issuperset(moments):
            try:
                artifacts.verify_directory(path)
            except StorageError:
                continue
            return path
    return None


def _moments(section: Mapping[str, Any], num_images: int, nimg: int) -> list[int]:
    """When a run of this length has stored its averages, up to image `nimg`."""
    moments = moments_of(num_images, int(section["batch_size"]), int(section.get("ema_snapshots", 0)))
    return [each for each in moments if each <= nimg]


def _copy_records(other: Path, run_dir: Path, nimg: int, totals: Sequence[int]) -> None:
    """Metrics, scores and pictures up to image `nimg`, for curves that begin at 0."""
    for name in RECORDS:
        kept = [record for record in read_records(other / name) if record["nimg"] <= nimg]
        lines = (record | {"total": record["total"] * totals[1] // totals[0]} if "total" in record else record
                 for record in kept)  # fmt: skip
        if kept:
            artifacts.write_atomic(run_dir / name, "".join(json.dumps(line) + "\n" for line in lines))
    for pattern in PICTURES:
        for path in other.glob(pattern):
            if int(path.stem[-12:]) <= nimg:
                target = run_dir / path.relative_to(other)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
