"""Training of a peer for so many CPU seconds of one thread, in a way that goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.base import Conditions, Peer, Setting, Task
from benchmarks.quality.peers import KINDS
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.evaluation.conditions import group_of
from pipeline.rng import generator_for

SEED = 0
BATCH = 16
CHECKPOINT_SECONDS = 60.0
HELD_OUT_REPEATS = 8


@dataclass(frozen=True)
class Data:
    """Training batches of the demo's data, with captions and groups."""

    dataset: PreparedDataset
    batch: int = BATCH

    @property
    def groups(self) -> list[str]:
        """The groups of the training split, in the order of their numbers."""
        rows = self.dataset.split("train")
        return sorted({group_of(self.dataset.rows[row]) for row in rows})

    @property
    def task(self) -> Task:
        """What there is to learn."""
        text_dim = int(str(self.dataset.text_encoder["dim"]))
        return Task(self.dataset.resolution, text_dim, len(self.groups))

    def numbers(self, rows: Iterable[int]) -> Tensor:
        """The group of each row, int64; one that training images do not have counts as the first."""
        place = {name: i for i, name in enumerate(self.groups)}
        return torch.tensor([place.get(group_of(self.dataset.rows[int(row)]), 0) for row in rows])

    def stream(self) -> Callable[[int], tuple[Tensor, Conditions]]:
        """Batches by nimg: images in -1..1, and their conditions."""
        batches = Batches(self.dataset, "train", SEED, self.batch, 1)

        def at(nimg: int) -> tuple[Tensor, Conditions]:
            images, text = batches.at(nimg, 0).to("cpu")
            return images / 127.5 - 1, Conditions(text, self.numbers(batches.places(nimg, 0)[1]))

        return at

    def held_out(self) -> tuple[Tensor, Conditions]:
        """The validation images with their names."""
        rows = self.dataset.split("val")
        text = self.dataset.text([self.dataset.caption_of(int(row)) for row in rows])
        return self.dataset.images(rows).float() / 127.5 - 1, Conditions(text, self.numbers(rows))


@dataclass
class Run:
    """A peer in training: `seconds` of CPU time and `nimg` images so far."""

    peer: Peer
    seconds: float = 0.0
    nimg: int = 0

    def save(self, path: Path) -> None:
        """Write everything, so that a stopped run goes on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        torch.save({"peer": self.peer.state(), "seconds": self.seconds, "nimg": self.nimg}, whole)
        whole.replace(path)

    def load(self, path: Path) -> None:
        """The inverse of `save`."""
        state = torch.load(path, weights_only=True)
        self.peer.load(state["peer"])
        self.seconds, self.nimg = state["seconds"], state["nimg"]


def fresh(name: str, task: Task, setting: Setting) -> Run:
    """A peer before training."""
    torch.manual_seed(SEED)
    return Run(KINDS[name](task, setting))


def advance(run: Run, at: Callable[[int], tuple[Tensor, Conditions]], total: float, seconds: float) -> None:
    """Train until `seconds` of a training that will have `total` CPU seconds."""
    while run.seconds < seconds:
        start = time.process_time()
        images, conditions = at(run.nimg)
        generator = generator_for(SEED, "quality", run.nimg)
        run.peer.update(images, conditions, (run.seconds + 1e-9) / total, generator)
        run.nimg += len(images)
        run.seconds += time.process_time() - start


def train(
    name: str,
    data: Data,
    setting: Setting,
    seconds: float,
    checkpoint: Path,
    log: Callable[[str], None] = lambda _: None,
) -> Run:
    """Train a peer for `seconds` of CPU time, from its checkpoint if there is one."""
    run = fresh(name, data.task, setting)
    if checkpoint.is_file():
        run.load(checkpoint)
    at = data.stream()
    while run.seconds < seconds:
        advance(run, at, seconds, min(run.seconds + CHECKPOINT_SECONDS, seconds))
        run.save(checkpoint)
        error = held_out_loss(run.peer, *data.held_out(), repeats=1)
        log(f"{name}: {run.seconds:.0f} of {seconds:.0f} s, {run.nimg:,} images, held-out loss {error:.4f}")
    return run


@torch.no_grad()
def held_out_loss(
    peer: Peer, images: Tensor, conditions: Conditions, repeats: int = HELD_OUT_REPEATS
) -> float:
    """The peer's own loss of held-out images with its averaged weights; the same noise at all times."""
    losses = []
    with peer.averaged():
        for repeat in range(repeats):
            generator = generator_for(SEED, "quality/held-out", repeat)
            losses.append(float(peer.loss(images, conditions, generator)))
    return sum(losses) / len(losses)
