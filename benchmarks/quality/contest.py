"""One peer from choice to samples, each step kept in a folder of its own so that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.base import Conditions, Peer, Setting
from benchmarks.quality.peers import DDPM, DIFFUSERS, EDM2
from benchmarks.quality.training import SEED, Data, Run, advance, fresh, held_out_loss, train
from benchmarks.train.settings import Plan
from pipeline.models.conditioning import Conditioning
from pipeline.models.counting import count_parameters, flops
from pipeline.rng import key
from pipeline.training.numerics import precision

SAMPLE_BATCH = 28


@dataclass(frozen=True)
class Candidates:
    """What a pilot chooses among: plans, and learning rates, the recipe's own first."""

    plans: tuple[Plan, ...]
    rates: tuple[float, ...]


# Near to the multiply-adds of a call of the demo's pyramid (0.70 G), to its parameters (1.56 M), or to both.
CANDIDATES = {
    EDM2: Candidates((Plan(16, (1, 1, 2, 3, 4), 1), Plan(12, (1, 1, 2, 4, 7), 1)), (0.01, 0.03)),
    DIFFUSERS: Candidates((Plan(16, (1, 1, 2, 2, 4), 1), Plan(8, (1, 2, 4, 8, 8), 1)), (1e-4, 1e-3)),
    DDPM: Candidates((Plan(8, (1, 1, 2, 4, 8)), Plan(12, (1, 1, 2, 4, 8))), (1e-4, 1e-3)),
}
FOLDERS = {EDM2: "edm2", DIFFUSERS: "diffusers", DDPM: "ddpm"}


class Trial(NamedTuple):
    """A candidate after a pilot."""

    setting: Setting
    parameters: int
    macs: float  # of one call, for one image
    nimg: int
    loss: float  # held-out, by the peer's own measure: comparable within one peer


@dataclass(frozen=True)
class Contest:
    """A peer, the data, the CPU seconds of a pilot and of the training, and where all is kept."""

    name: str
    data: Data
    candidates: Candidates
    pilot: float
    seconds: float
    folder: Path
    log: Callable[[str], None]

    def trials(self) -> list[Trial]:
        """The rates with the first plan, then the other plans with the best rate; the best trial comes first."""
        path = self.folder / "trials.json"
        if path.is_file():
            return [read_trial(each) for each in json.loads(path.read_text())]
        half = precision("auto", torch.device("cpu")) is torch.bfloat16
        first, *others = self.candidates.plans
        tried = [self.trial(Setting(first, rate, half)) for rate in self.candidates.rates]
        best = min(tried, key=lambda trial: trial.loss).setting
        tried += [self.trial(replace(best, plan=plan)) for plan in others]
        tried.sort(key=lambda trial: trial.loss)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{**t._asdict(), "setting": asdict(t.setting)} for t in tried], indent=1))
        return tried

    def trial(self, setting: Setting) -> Trial:
        """A pilot of one candidate."""
        run = fresh(self.name, self.data.task, setting)
        advance(run, self.data.stream(), self.pilot, self.pilot)
        loss = held_out_loss(run.peer, *self.data.held_out())
        self.log(f"{self.name}, {setting.plan}, rate {setting.lr:g}: {run.nimg:,} images, loss {loss:.4f}")
        return Trial(setting, network_parameters(run.peer), call_macs(run.peer), run.nimg, loss)

    def trained(self) -> Run:
        """The best candidate, trained."""
        setting = self.trials()[0].setting
        checkpoint = self.folder / "training.pt"
        return train(self.name, self.data, setting, self.seconds, checkpoint, self.log)

    def samples(self, peer: Peer, sampler: str, calls: int, conditions: Conditions) -> Tensor:
        """uint8 [N,3,R,R] of the averaged weights."""
        path = self.folder / f"samples-{sampler}-{calls}-{len(conditions.groups)}.npy"
        if path.is_file():
            return torch.from_numpy(np.load(path))
        parts = []
        with torch.no_grad(), peer.averaged():
            for start in range(0, len(conditions.groups), SAMPLE_BATCH):
                some = conditions.select(slice(start, start + SAMPLE_BATCH))
                seed = key(SEED, "quality/samples", start)
                parts.append(to_uint8(peer.samplers[sampler](some, calls, seed)))
        images = torch.cat(parts)
        np.save(path, images.numpy())
        self.log(f"{self.name}, {sampler}, {calls} calls: {len(images)} images")
        return images


def read_trial(values: dict[str, Any]) -> Trial:
    """A trial from JSON."""
    plan = Plan(**values["setting"]["plan"])
    setting = Setting(**values["setting"] | {"plan": replace(plan, multiples=tuple(plan.multiples))})
    return Trial(**values | {"setting": setting})


def to_uint8(images: Tensor) -> Tensor:
    """Images in -1..1 as grey levels."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def network_parameters(peer: Peer) -> int:
    """Without what only training uses."""
    net: nn.Module = peer.net
    return count_parameters(getattr(net, "net", net))


def call_macs(peer: Peer) -> float:
    """Multiply-adds of one call for one image, counted while the fewest calls draw one."""
    sampler, calls = next(iter(peer.samplers.values())), peer.calls[0]
    conditions = blank(peer)
    with torch.no_grad():
        return flops(lambda: sampler(conditions, calls, SEED)) / 2 / calls


def blank(peer: Peer) -> Conditions:
    """Conditions of one image, without a caption."""
    width = peer.task.text_dim
    text = Conditioning(torch.zeros(1, width), torch.zeros(1, 16, width), torch.ones(1, 16, dtype=torch.bool))
    return Conditions(text, torch.zeros(1, dtype=torch.int64))


def installed(names: Sequence[str]) -> list[str]:
    """Those of the peers whose package can be imported."""
    packages = {DIFFUSERS: "diffusers", DDPM: "denoising_diffusion_pytorch"}
    return [name for name in names if name not in packages or find_spec(packages[name]) is not None]
