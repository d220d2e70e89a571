"""Sampling all contenders: in batches of fixed composition, here or on several machines, with equal results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.errors import StorageError
from pipeline.evaluation import metrics
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.contenders import Contender
from pipeline.evaluation.cores import side_by_side
from pipeline.evaluation.features import to_resolution
from pipeline.models.conditioning import Conditioning
from pipeline.models.shape import SQUARE, Images, Shape, in_order
from pipeline.models.snapshot import Snapshot, load_snapshot


@dataclass(frozen=True)
class SampleTask:
    """One batch of one contender on one caption set."""

    number: int
    contender: Contender
    text: Conditioning
    seeds: Sequence[int]
    shape: Shape = SQUARE


@dataclass(frozen=True)
class SampleResult:
    """The images of a task: uint8 [n,3,H,W] as numpy, calls per image, and seconds."""

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

    images: Images  # uint8, at the resolution of the data
    nfe: int
    seconds: float  # of one process, all batches


def run_locally(
    make: Callable[[], AbstractContextManager[Work]], tasks: Sequence[SampleTask]
) -> Iterator[SampleResult]:
    """A `TaskMapper` in this process, on all of its cores."""
    with make() as work:
        yield from side_by_side(work, tasks)


@contextmanager
def sampler(folders: Mapping[str, tuple[str, str]], device: str) -> Iterator[Work]:
    """A function that carries out tasks with the snapshots in `folders`, {name: (folder, digest)}; each is
    loaded when a task needs it, and kept for the time of the block.

    The function raises StorageError where a snapshot is not the one of the digest any more."""
    loaded: dict[str, Snapshot] = {}
    loading = Lock()

    def work(task: SampleTask) -> SampleResult:
        name = task.contender.model
        with loading:
            if name not in loaded:
                loaded[name] = _load(*folders[name], device)
        start = time.perf_counter()
        result = task.contender.sample(loaded[name], task.text, task.seeds, len(task.seeds), task.shape)
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
    on_progress: Callable[[int, int], None],
) -> dict[str, dict[str, Samples]]:
    """Samples by caption set and contender. Batches are the same wherever they are computed; `on_progress` is
    called with the number of those that are done, and of all."""
    asked = {each.split: list(batches_of(each, dataset, seed, batch_size)) for each in caption_sets}
    tasks: list[SampleTask] = []
    places: list[tuple[str, str]] = []
    for contender in contenders:
        for split, batches in asked.items():
            for batch in batches:
                tasks.append(SampleTask(len(tasks), contender, batch.text, batch.seeds, batch.shape))
                places.append((split, contender.name))
    results: dict[int, SampleResult] = {}
    on_progress(0, len(tasks))
    for result in map_tasks(make, tasks):
        results[result.number] = result
        on_progress(len(results), len(tasks))
    grouped: dict[str, dict[str, list[SampleResult]]] = {}
    for number in range(len(tasks)):
        split, name = places[number]
        grouped.setdefault(split, {}).setdefault(name, []).append(results[number])
    return {
        split: {name: _join(parts, asked[split], dataset.resolution) for name, parts in by_name.items()}
        for split, by_name in grouped.items()
    }


class CaptionBatch(NamedTuple):
    """Captions and seeds of images of one shape; `places` of these images in `CaptionSet.which`."""

    places: Sequence[int]
    text: Conditioning
    seeds: Sequence[int]
    shape: Shape


def batches_of(
    captions: CaptionSet, dataset: PreparedDataset, seed: int, batch_size: int, purpose: str = "evaluate"
) -> Iterator[CaptionBatch]:
    """What to draw of a caption set: images of the shapes of their captions' own, one shape a batch."""
    seeds, rows = captions.seeds(seed, purpose), captions.rows[captions.which]
    for own in dataset.by_bucket(rows):
        text = dataset.text([captions.caption_ids[captions.which[i]] for i in own])
        shape = dataset.shape_of(int(rows[own[0]]))
        for start in range(0, len(own), batch_size):
            some = slice(start, start + batch_size)
            places = own[some].tolist()
            yield CaptionBatch(places, text.select(some), [seeds[i] for i in places], shape)


def _join(parts: Sequence[SampleResult], batches: Sequence[CaptionBatch], resolution: int) -> Samples:
    images: dict[int, Tensor] = {}
    for part, batch in zip(parts, batches, strict=True):
        drawn = to_resolution(torch.from_numpy(part.images), resolution, batch.shape)
        images |= zip(batch.places, drawn, strict=True)
    return Samples(in_order(images), parts[0].nfe, sum(part.seconds for part in parts))


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
