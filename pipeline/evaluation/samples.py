"""Sampling all contenders: in batches of fixed composition, here or on several machines, with equal results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import in_batches
from pipeline.errors import StorageError
from pipeline.evaluation import metrics
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.contenders import Contender
from pipeline.evaluation.features import to_resolution
from pipeline.models.conditioning import Conditioning
from pipeline.models.snapshot import Snapshot, load_snapshot


@dataclass(frozen=True)
class SampleTask:
    """One batch of one contender on one caption set."""

    number: int
    contender: Contender
    text: Conditioning
    seeds: Sequence[int]


@dataclass(frozen=True)
class SampleResult:
    """The images of a task: uint8 [n,3,R,R] as numpy, calls per image, and seconds."""

    number: int
    images: np.ndarray[Any, np.dtype[np.uint8]]
    nfe: int
    seconds: float


Work = Callable[[SampleTask], SampleResult]
TaskMapper = Callable[
    [Callable[[], AbstractContextManager[Work]], Sequence[SampleTask]], Iterable[SampleResult]
]


@dataclass(frozen=True)
class Samples:
    """Images of one contender for one caption set, in the order of `CaptionSet.which`."""

    images: Tensor  # uint8 [N,3,R,R], at the resolution of the data
    nfe: int
    seconds: float  # of one process, all batches


def run_locally(
    make: Callable[[], AbstractContextManager[Work]], tasks: Sequence[SampleTask]
) -> Iterator[SampleResult]:
    """A `TaskMapper` in this process."""
    with make() as work:
        yield from map(work, tasks)


@contextmanager
def sampler(folders: Mapping[str, tuple[str, str]], device: str) -> Iterator[Work]:
    """A function that carries out tasks with the snapshots in `folders`, {name: (folder, digest)}; each is
    loaded when a task needs it, and kept for the time of the block.

    The function raises StorageError where a snapshot is not the one of the digest any more."""
    loaded: dict[str, Snapshot] = {}

    def work(task: SampleTask) -> SampleResult:
        name = task.contender.model
        if name not in loaded:
            loaded[name] = _load(*folders[name], device)
        start = time.perf_counter()
        result = task.contender.sample(loaded[name], task.text, task.seeds, len(task.seeds))
        seconds = time.perf_counter() - start
        return SampleResult(task.number, result.images.numpy(), result.nfe, seconds)

    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield work
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _load(folder: str, digest: str, device: str) -> Snapshot:
    snapshot = load_snapshot(folder, device)
    if snapshot.digest != digest:
        problem = "has changed since the evaluation began"
        raise StorageError("E-IO-061", folder, problem, "run `dvc repro evaluate` again")
    return snapshot


def sample_all(
    contenders: Sequence[Contender],
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
    seed: int,
    batch_size: int,
    make: Callable[[], AbstractContextManager[Work]],
    map_tasks: TaskMapper,
    log: Callable[[str], None],
) -> dict[str, dict[str, Samples]]:
    """Samples by caption set and contender. Batches are the same wherever they are computed."""
    asked = {
        each.split: (dataset.text([each.caption_ids[i] for i in each.which]), each.seeds(seed))
        for each in caption_sets
    }
    tasks: list[SampleTask] = []
    places: list[tuple[str, str]] = []
    for contender in contenders:
        for split, (text, seeds) in asked.items():
            for part, own in in_batches(text, seeds, batch_size):
                tasks.append(SampleTask(len(tasks), contender, part, own))
                places.append((split, contender.name))
    results: dict[int, SampleResult] = {}
    for result in map_tasks(make, tasks):
        results[result.number] = result
        split, name = places[result.number]
        log(f"sampled {len(results)} of {len(tasks)} batches: {name}, {split} captions, {result.nfe} calls")
    grouped: dict[str, dict[str, list[SampleResult]]] = {}
    for number in range(len(tasks)):
        split, name = places[number]
        grouped.setdefault(split, {}).setdefault(name, []).append(results[number])
    return {
        split: {name: _join(parts, dataset.resolution) for name, parts in by_name.items()}
        for split, by_name in grouped.items()
    }


def _join(parts: Sequence[SampleResult], resolution: int) -> Samples:
    images = torch.from_numpy(np.concatenate([part.images for part in parts]))
    return Samples(to_resolution(images, resolution), parts[0].nfe, sum(part.seconds for part in parts))


def throughput(samples: Mapping[str, Mapping[str, Samples]]) -> dict[str, Any]:
    """The content of throughput.json: seconds per image of one process, by caption set and contender."""
    return {
        f"{split}/{name}": {
            "images": len(each.images),
            "nfe": each.nfe,
            "seconds": round(each.seconds, 3),
            "seconds_per_image": metrics.rounded(each.seconds / len(each.images)),
        }
        for split, by_name in samples.items()
        for name, each in by_name.items()
    }
