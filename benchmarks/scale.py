"""What growth costs: parameters, multiply-adds, memory and time of the presets' pyramids, octave by octave.

    python -m benchmarks.scale [--presets small base] [--top 1024] [--steps 32] [--seconds 20]

Counted without allocating anything (on torch's meta device): parameters; multiply-adds of one call of each
level and of the whole pyramid, for one image; the steps of an image that run at each level, and their cost
beside all steps at full resolution; the bytes that the stage which trains a level holds. Measured, at
batch 1 and as long as one run takes no more than `--seconds`: an image (DPM++(2M), no guidance) and a
training update of the finest level. Larger sizes are planned (`~`) from the rate of the last one measured.
Beyond a preset's last shell each has half the channels of the one before, but at least 16.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import machine, significant, table
from benchmarks.train.crescendo import RandomBatches
from benchmarks.train.settings import TEXT_DIM
from benchmarks.train.timing import log, seconds_of
from pipeline.diffusion.ema import power_decay
from pipeline.diffusion.loss import denoising_loss, tiled_loss
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.schedule import steps_by_level
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.counting import count_parameters, flops
from pipeline.models.denoiser import (
    Denoiser,
    build_core,
    build_shell,
    pyramid_levels,
    set_dtype,
)
from pipeline.models.statistics import Statistics
from pipeline.models.tiles import trained_tiles
from pipeline.overview.counting import high_band
from pipeline.training.denoising import DenoisingSettings, DenoisingStep
from pipeline.training.state import Learner, TrainState

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("cpu-demo", "small", "base", "large")
MIN_CHANNELS = 16
SIGMA_MAX, SIGMA_MIN = 80.0, 0.002
AVERAGES = (0.05, 0.10)


# --- Shapes.


@dataclass(frozen=True)
class Shape:
    """Keyword values of the networks of one pyramid, and the px of its core."""

    core: dict[str, Any]
    shells: tuple[dict[str, Any], ...]
    core_resolution: int = 32

    def shell(self, octave: int) -> dict[str, Any]:
        """Of the shell that doubles the resolution for the `octave`th time, from 0."""
        known = self.shells[min(octave, len(self.shells) - 1)]
        beyond = max(octave - len(self.shells) + 1, 0)
        return {**known, "channels": max(known["channels"] >> beyond, min(known["channels"], MIN_CHANNELS))}

    def build(self, resolution: int) -> Denoiser:
        """The core and its shells up to `resolution`."""
        denoiser: Denoiser = build_core(self.core_resolution, TEXT_DIM, self.core)
        while denoiser.resolution < resolution:
            net = self.shell(len(pyramid_levels(denoiser)) - 1)
            denoiser = build_shell(denoiser, TEXT_DIM, high_band(2 * denoiser.resolution) ** 2, net)
        return denoiser


def read_shape(name: str) -> Shape:
    """Of a preset: its core, its shell, and those of the presets that add an octave each."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    paths = [ROOT / "presets" / f"{file}.yaml" for file in (name, f"{name}-128", f"{name}-256")]
    trees = [yaml.load(path.read_text()) for path in paths if path.is_file()]
    core = {key: value for key, value in trees[0]["core"].items() if key != "resolution"}
    shells = [{**tree["shell"], "channels": width} for tree in trees for width in widths(tree["shell"])]
    return Shape(core, tuple(shells), trees[0]["core"]["resolution"])


def widths(shell: dict[str, Any]) -> list[int]:
    """Channels of a preset's shells, which it gives as one number or as a list."""
    channels = shell["channels"]
    return channels if isinstance(channels, list) else [channels]


# --- Counting.


class Memory(NamedTuple):
    """Bytes of the stage that trains the finest level of a pyramid."""

    state: int  # weights, gradient, optimizer, averages
    sharded: int  # of these, what `shard_state` of a profile spreads over workers: optimizer, averages
    activations: int  # that its update keeps for the backward pass, at batch 1
    activations_whole: int  # the same without tiles
    trained: float  # fraction of an image that an update passes through the finest level: below 1 with tiles


class Plan(NamedTuple):
    """Costs of the pyramid up to one resolution, counted without running it."""

    resolution: int
    channels: int  # of its finest level
    parameters: int
    macs: list[float]  # multiply-adds of one call up to each level, core first
    steps: list[int]  # of an image, at each level
    memory: Memory

    @property
    def image(self) -> float:
        """Multiply-adds of an image, coarse to fine."""
        return sum(n * cost for n, cost in zip(self.steps, self.macs, strict=True))

    @property
    def whole(self) -> float:
        """Multiply-adds of an image with all steps at full resolution."""
        return sum(self.steps) * self.macs[-1]


def steps_at_levels(denoiser: Denoiser, num_steps: int) -> list[int]:
    """Steps of `sample_pyramid` at each level, core first, by default settings."""
    return steps_by_level(pyramid_levels(denoiser), SamplerSettings(num_steps))


def kept_bytes(work: Callable[[], object], model: nn.Module) -> int:
    """Bytes that `work` keeps for its backward pass, each storage once, without the parameters of `model`."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that none is counted twice or reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def memory_of(denoiser: Denoiser) -> Memory:
    """Count what training the finest level of a pyramid on torch's meta device holds."""
    side = denoiser.resolution
    with torch.device("meta"):
        noisy = torch.empty(1, 3, side, side)
        inputs = noisy, torch.ones(1), noisy, captions("meta")
        kept = [kept_bytes(lambda: denoising_loss(denoiser, *inputs), denoiser)]
        trained_part = 1.0
        if tiled := trained_tiles(denoiser, noisy.shape[2:]):
            shell, cut, count = tiled
            tiles = cut.from_index(torch.arange(count)), torch.ones(count)
            kept.append(kept_bytes(lambda: tiled_loss(shell, *inputs, cut, tiles), denoiser))
            trained_part = count * (cut.window / side) ** 2
    total, trained = count_parameters(denoiser), count_parameters(denoiser.net)
    sharded = 4 * (2 + len(AVERAGES)) * trained
    return Memory(4 * (total + trained) + sharded, sharded, kept[-1], kept[0], trained_part)


def built(shape: Shape, resolution: int, dtype: torch.dtype) -> Denoiser:
    """The pyramid up to `resolution` on torch's meta device."""
    with torch.device("meta"):
        denoiser = shape.build(resolution)
    set_dtype(denoiser, dtype)
    return denoiser


def plan(shape: Shape, resolution: int, num_steps: int, dtype: torch.dtype) -> Plan:
    """Count the pyramid up to `resolution`."""
    denoiser, macs = built(shape, resolution, dtype), []
    with torch.device("meta"), torch.no_grad():
        for level in pyramid_levels(denoiser):
            noisy = torch.empty(1, 3, level.resolution, level.resolution)
            macs.append(flops(partial(level, noisy, torch.ones(1), captions("meta"))) / 2)
    return Plan(
        resolution,
        denoiser.net.feature_channels,
        count_parameters(denoiser),
        macs,
        steps_at_levels(denoiser, num_steps),
        memory_of(denoiser),
    )


def captions(device: str) -> Conditioning:
    """One caption."""
    return RandomBatches(1, 1).text.to(device)


# --- Timing.


def update_of(denoiser: Denoiser) -> Callable[[], object]:
    """An update of the finest level at batch 1, as the stages do it."""
    trained = nn.ModuleList([denoiser.net, denoiser.logvar])
    averages = {f"{std:g}": partial(power_decay, std) for std in AVERAGES}
    state = TrainState({"net": Learner(trained, (0.9, 0.99), averages)})
    step = DenoisingStep(
        denoiser=denoiser,
        batches=RandomBatches(denoiser.resolution, 1),
        statistics=Statistics((0.0,) * 3, (0.6,) * 3),
        draw_sigma=lambda batch, generator: lognormal_sigma(batch, -0.8, 1.4, generator),
        settings=DenoisingSettings(
            seed=0,
            batch_size=1,
            shards=1,
            lr=0.01,
            warmup_images=0,
            num_images=10**12,
            text_dropout=0.1,
        ),
    )
    return lambda: step(state)


def sampling_of(denoiser: Denoiser, num_steps: int) -> Callable[[], object]:
    """Sampling of an image, one call a step."""
    text = captions("cpu")
    settings = SamplerSettings(num_steps, "dpmpp_2m")
    return lambda: sample_pyramid(denoiser, text, [0], settings, sigma_max=SIGMA_MAX, sigma_min=SIGMA_MIN)


class Clock:
    """Seconds of one kind of work by its cost: a median of repeats; extrapolated once a run would take too long."""

    def __init__(self, limit: float, repeats: int) -> None:
        self.limit, self.repeats = limit, repeats
        self.pace: float | None = None  # seconds for each unit of cost, at the last size measured

    def allows(self, cost: float) -> bool:
        """Whether work of this cost is to be measured."""
        return self.limit > 0 and (self.pace is None or cost * self.pace <= self.limit)

    def measure(self, work: Callable[[], object], cost: float) -> str:
        """A cell: measured seconds."""
        work()
        seconds = statistics.median(seconds_of(work, torch.device("cpu"), 1) for _ in range(self.repeats))
        self.pace = seconds / cost
        return significant(seconds)

    def planned(self, cost: float) -> str:
        """A cell: seconds extrapolated from the last pace."""
        return "" if self.pace is None else f"~{significant(cost * self.pace)}"


def timed(shape: Shape, counts: Plan, clocks: tuple[Clock, Clock], dtype: torch.dtype) -> tuple[str, str]:
    """Cells: seconds of an image and of an update, which costs three passes of its level and one of the others."""
    below = counts.macs[-2] if len(counts.macs) > 1 else 0.0
    costs = counts.image, below + 3 * (counts.macs[-1] - below) * counts.memory.trained
    if not any(clock.allows(cost) for clock, cost in zip(clocks, costs, strict=True)):
        return clocks[0].planned(costs[0]), clocks[1].planned(costs[1])
    torch.manual_seed(0)
    denoiser = shape.build(counts.resolution)
    set_dtype(denoiser, dtype)
    works = (lambda: sampling_of(denoiser, sum(counts.steps)), lambda: update_of(denoiser))
    cells = [
        clock.measure(make(), cost) if clock.allows(cost) else clock.planned(cost)
        for make, clock, cost in zip(works, clocks, costs, strict=True)
    ]
    return cells[0], cells[1]


# --- Tables.

HEADERS = (
    "px",
    "channels",
    "parameters",
    "GMAC, level",
    "GMAC, pyramid",
    "steps by level",
    "TMAC a picture",
    "all at full size",
    "ratio",
    "state, MiB",
    "activations, MiB",
    "without tiles",
    "s a picture",
    "s an update",
)


def row(counts: Plan, seconds: Sequence[str]) -> list[str]:
    """One line of the table."""
    below = counts.macs[-2] if len(counts.macs) > 1 else 0.0
    return [
        str(counts.resolution),
        str(counts.channels),
        f"{counts.parameters / 1e6:.2f}M",
        significant((counts.macs[-1] - below) / 1e9),
        significant(counts.macs[-1] / 1e9),
        " + ".join(map(str, counts.steps)),
        significant(counts.image / 1e12),
        significant(counts.whole / 1e12),
        f"{counts.whole / counts.image:.2f}x",
        f"{counts.memory.state / 2**20:,.0f}",
        f"{counts.memory.activations / 2**20:,.0f}",
        f"{counts.memory.activations_whole / 2**20:,.0f}",
        *seconds,
    ]


def scale_table(
    shape: Shape,
    top: int,
    num_steps: int,
    limit: float,
    repeats: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """A line for the core and for each shell up to `top` px."""
    clocks = Clock(limit, repeats), Clock(limit, repeats)
    lines, resolution = [], shape.core_resolution
    while resolution <= top:
        counts = plan(shape, resolution, num_steps, dtype)
        lines.append(row(counts, timed(shape, counts, clocks, dtype)))
        log(" | ".join(lines[-1]))
        resolution *= 2
    return table(HEADERS, lines)


def tables(args: argparse.Namespace) -> Iterator[str]:
    """One for each preset."""
    dtype = getattr(torch, args.dtype)
    for name in args.presets:
        shape = read_shape(name)
        text = scale_table(shape, args.top, args.steps, args.seconds, args.repeats, dtype)
        yield f"{name}, {args.steps} steps, {args.dtype}\n\n{text}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--presets", choices=PRESETS, nargs="*", default=PRESETS)
    parser.add_argument("--top", type=int, default=1024, help="px")
    parser.add_argument("--steps", type=int, default=32, help="of an image")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one run that is measured; 0 = none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine(['torch'])}\n")
    for text in tables(args):
        print(f"{text}\n", flush=True)


if __name__ == "__main__":
    main()
