"""Contenders: chosen, built, and what one update of each takes."""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import build
from benchmarks.train.counting import choose, own_cost, peer_cost
from benchmarks.train.crescendo import Crescendo
from benchmarks.train.peers import BUILDERS, Peer
from benchmarks.train.settings import OURS, TINY, Cost, Plan, Setting, Size
from benchmarks.train.timing import log, seconds_of
from pipeline.models.counting import flops

Contender = Crescendo | Peer


@dataclass(frozen=True)
class Choice:
    """A contender that is yet to be built, anywhere."""

    name: str
    plan: Size | Plan
    channels_last: bool = False  # of peers; our networks choose for themselves
    compiled: bool = False
    recorded: bool = True  # ours, on a GPU: passes as CUDA graphs

    def make(self, setting: Setting) -> Contender:
        """Build it, after one update."""
        contender: Contender = (
            Crescendo(self.plan, setting, self.recorded, self.compiled)
            if isinstance(self.plan, Size)
            else Peer(self.name, self.plan, setting, self.channels_last, compiled=self.compiled)
        )
        contender.step()
        return contender

    def cost(self, resolution: int) -> Cost:
        """What it holds and does."""
        if isinstance(self.plan, Size):
            return own_cost(self.plan)
        return peer_cost(self.name, self.plan, resolution)

    def training_flops(self, setting: Setting) -> int:
        """Of one update, for one image: forward and backward, what is frozen included."""
        small = replace(setting, batch=1, device=torch.device("cpu"), dtype=torch.float32)
        return flops(replace(self, compiled=False).make(small).step)

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.plan}{layout}"

    @property
    def label(self) -> str:
        """Its name in a table."""
        return (
            f"{self.name}{', compiled' if self.compiled else ''}{'' if self.recorded else ', not recorded'}"
        )


def choices(size: Size, setting: Setting, equal: str) -> dict[str, Choice]:
    """Ours, and the peers that are installed with what is chosen for them."""
    size = size.upto(setting.resolution)
    target = own_cost(size)
    chosen = {OURS: Choice(OURS, size)}
    plans = build({name: partial(choose, name, setting.resolution, target, equal) for name in BUILDERS})
    for name, plan in plans.items():
        both = [Choice(name, plan, channels_last) for channels_last in (False, True)]
        chosen[name] = min(both, key=partial(trial, setting=setting))
        log(f"{name}: {chosen[name]}")
    if setting.device.type == "cuda":
        plain = replace(chosen[OURS], recorded=False)
        chosen[plain.label] = plain
    return chosen


def trial(choice: Choice, setting: Setting) -> float:
    """Seconds for an update, the best of a few."""
    step = choice.make(setting).step
    return min(seconds_of(step, setting.device, 1) for _ in range(4))


class Built(NamedTuple):
    """A contender, and what one update of it takes."""

    contender: Contender
    flops: int  # for one image
    bytes: int | None  # at its peak


def weighed(choice: Choice, setting: Setting, weigh: bool) -> Built:
    """Build and count; bytes are of a GPU's allocations, or of a fresh process beyond its imports'."""
    if setting.device.type == "cpu":
        peak = resident(choice, setting) if weigh else None
        return Built(choice.make(setting), choice.training_flops(setting), peak)
    gc.collect()
    before = torch.cuda.memory_allocated()
    contender = choice.make(setting)
    torch.cuda.reset_peak_memory_stats()
    contender.step()
    peak = torch.cuda.max_memory_allocated() - before
    built = Built(contender, flops(contender.step) // setting.batch, peak)
    log(f"{choice.label}: built")
    return built


def resident(choice: Choice, setting: Setting) -> int:
    """Bytes of a fresh process at the peak of an update, beyond its imports'."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, choice, setting, torch.get_num_threads()).result()


def _resident(choice: Choice, setting: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    own = isinstance(choice.plan, Size)
    small = replace(choice, plan=TINY.upto(8) if own else Plan(8, (1, 2)))
    small.make(replace(setting, resolution=8, batch=1))  # so that imports are not counted
    before = _status("VmRSS")
    contender = choice.make(setting)
    contender.step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, of this process alone; getrusage counts the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
