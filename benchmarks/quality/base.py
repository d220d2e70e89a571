"""What peers have in common: what they are told, how their parts are updated, averaged and kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.train.settings import Plan
from pipeline.models.conditioning import Conditioning

State = dict[str, Any]
Sampler = Callable[["Conditions", int, int], Tensor]  # conditions, calls, seed -> images in -1..1


class Conditions(NamedTuple):
    """What peers may be told of a batch of B images."""

    text: Conditioning  # float32
    groups: Tensor  # int64 [B], the group of the data set that the image belongs to

    def select(self, rows: slice) -> Conditions:
        """Some rows of the batch."""
        return Conditions(self.text.select(rows), self.groups[rows])


@dataclass(frozen=True)
class Task:
    """What all contenders learn: images of `resolution` px, from captions of `text_dim` numbers or `num_groups`
    groups."""

    resolution: int
    text_dim: int
    num_groups: int


@dataclass(frozen=True)
class Setting:
    """What is chosen for a peer: its plan, peak learning rate, and whether it computes in bfloat16."""

    plan: Plan
    lr: float
    half: bool = False


class Peer(ABC):
    """A network with torch's own optimizer and an average of its weights; the recipes below fill it in.

    samplers: by name, and the numbers of calls to try."""

    sees = "captions"
    samplers: Mapping[str, Sampler]
    calls: Sequence[int] = (8, 16, 32, 64)

    def __init__(
        self, task: Task, setting: Setting, net: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.task, self.net, self.setting, self.updates = task, net, setting, 0
        self.optimizer = optimizer
        self.average = {name: value.clone() for name, value in net.state_dict().items()}

    @abstractmethod
    def loss(self, images: Tensor, conditions: Conditions, generator: torch.Generator) -> Tensor:
        """Mean loss of images [B,3,R,R] in -1..1."""

    @abstractmethod
    def update(
        self, images: Tensor, conditions: Conditions, progress: float, generator: torch.Generator
    ) -> float:
        """One update; returns the loss."""

    def precise(self, output: Callable[[], Tensor]) -> Tensor:
        """The network's output, computed as the setting says."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.half):
            return output().float()

    def fresh_noise(self, count: int, seed: int) -> Tensor:
        """Unit Gaussian noise [count,3,R,R]."""
        side = self.task.resolution
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with its averaged weights, ready to be used."""
        kept = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(self.average)
        self.net.eval()
        try:
            yield
        finally:
            self.net.load_state_dict(kept)
            self.net.train()

    def state(self) -> State:
        """All that training changes."""
        assert self.optimizer is not None
        return {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load(self, state: State) -> None:
        """The inverse of `state`."""
        assert self.optimizer is not None
        self.net.load_state_dict(state["net"])
        self.average, self.updates = state["average"], state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])


class TorchPeer(Peer):
    """A peer that is updated by torch's optimizer, with a rate and an average of its own."""

    @abstractmethod
    def learning_rate(self, progress: float) -> float:
        """By the fraction of the training that is done."""

    @abstractmethod
    def decay(self) -> float:
        """Weight kept of the average, after `updates`."""

    def update(
        self, images: Tensor, conditions: Conditions, progress: float, generator: torch.Generator
    ) -> float:
        """One update; returns the loss."""
        assert self.optimizer is not None
        loss = self.loss(images, conditions, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        keep = self.decay()
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - keep)
        return float(loss.detach())
