"""A whole training update (forward, backward, optimizer, averages) beside those of diffusers' UNet2DModel and
denoising-diffusion-pytorch's Unet.

    python -m benchmarks.train [--size demo|small] [--only parameters|multiply-adds|update]
    python -m benchmarks.train --device cuda --out train.md
    python -m benchmarks.train --profile

Ours is a core and the shells above it. An image counts as seen when every level has had its own update on it, as
the stages do one after the other: the passes of frozen levels are paid for, and counted, once more for each shell.
Peers are trained by their own recipes, in autocast where the precision is bfloat16. What is alike and what is not
stands in README.md. Needs torch, numpy and safetensors alone, and the peers that are to take part.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Run, absent, build, interleave, machine, ratio, show, significant, table
from pipeline.data.dataset import Batch
from pipeline.diffusion.ema import power_decay
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, build_core, build_shell, pyramid_levels, set_dtype
from pipeline.models.statistics import Statistics
from pipeline.training.cuda_graphs import WARM_UP
from pipeline.training.denoising import DenoisingStep
from pipeline.training.distributed import average_gradient
from pipeline.training.state import Learner, TrainState

PACKAGES = ("torch", "diffusers", "denoising-diffusion-pytorch", "ema-pytorch")
OURS, DIFFUSERS, DDPM = "crescendo", "diffusers UNet2DModel", "denoising-diffusion-pytorch Unet"
CONTENDERS = (OURS, DIFFUSERS, DDPM)
TABLES = ("parameters", "multiply-adds", "update")
TOLERANCE = 0.1  # of what is to be equal
TEXT_DIM, TOKENS = 384, 16
DATASHEET = {"H100": 989e12, "H200": 989e12}  # bf16, dense, FLOP/s


# --- What is to be trained.


@dataclass(frozen=True)
class Size:
    """Keyword values of our networks."""

    core: dict[str, Any]
    shells: tuple[dict[str, Any], ...]  # as many as there may be
    core_resolution: int = 32

    def __str__(self) -> str:
        core = self.core
        plan = Plan(core["channels"], tuple(core["channel_mult"]), core.get("num_blocks", 1))
        return " + ".join([str(plan), *(str(shell["channels"]) for shell in self.shells)])

    def upto(self, resolution: int) -> Size:
        """With the shells that end at `resolution`."""
        return replace(self, shells=self.shells[: round(math.log2(resolution / self.core_resolution))])


SMALL = Size(
    core={"patch": 1, "channels": 96, "channel_mult": (1, 2, 3), "num_blocks": 3, "attention": (16, 8)},
    shells=tuple({"patch": 1, "channels": width, "num_blocks": 3} for width in (64, 32)),
)
TINY = Size(
    core={"patch": 1, "channels": 16, "channel_mult": (1, 2), "attention": (4,)},
    shells=({"patch": 2, "channels": 16},),
    core_resolution=8,
)


def demo() -> Size:
    """The networks of params.yaml."""
    from pipeline.config.params import load_params  # which needs what a bare machine lacks

    p = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
    core = p.core.model_dump(mode="json", exclude={"resolution"})
    return Size(core, tuple(p.shell.nets()), p.core.resolution)


SIZES: dict[str, Callable[[], Size]] = {"demo": demo, "small": lambda: SMALL, "tiny": lambda: TINY}


@dataclass(frozen=True)
class Setting:
    """How all contenders of a table are trained."""

    device: torch.device
    dtype: torch.dtype
    resolution: int
    batch: int
    seconds: float = 1.0  # of one run
    repeats: int = 5


@dataclass(frozen=True)
class Plan:
    """A peer's network: base width, multiples of it for each level, blocks a level."""

    width: int
    multiples: tuple[int, ...]
    blocks: int = 2

    def __str__(self) -> str:
        return f"{self.width}x[{' '.join(map(str, self.multiples))}], {self.blocks}"


class Cost(NamedTuple):
    """What a network holds and does."""

    parameters: int
    macs: float  # multiply-adds of a forward pass for one image


# --- Ours.


class Pictures:
    """Random images and captions, always the same ones, in the place of a data set."""

    def __init__(self, resolution: int, batch: int) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (batch, 3, resolution, resolution)
        self.images = torch.randint(256, shape, generator=random, dtype=torch.uint8)
        tokens = torch.randn(batch, TOKENS, TEXT_DIM, generator=random)
        self.text = Conditioning(tokens.mean(dim=1), tokens, torch.ones(batch, TOKENS, dtype=torch.bool))

    def at(self, nimg: int, shard: int) -> Batch:
        """The batch."""
        return Batch(self.images, 1, self.text, None)


def build_levels(size: Size) -> list[Denoiser]:
    """The core and its shells."""
    denoiser: Denoiser = build_core(size.core_resolution, TEXT_DIM, size.core)
    for shell in size.shells:
        denoiser = build_shell(denoiser, TEXT_DIM, 0.04, shell)
    return pyramid_levels(denoiser)


class Crescendo:
    """Our networks, and the steps of the stages that train them."""

    def __init__(self, size: Size, setting: Setting, recorded: bool = True, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.batch = setting.batch
        self.recorded, self.compiled = recorded and setting.device.type == "cuda", compiled
        self.levels = [level.to(setting.device) for level in build_levels(size)]
        set_dtype(self.levels[-1], setting.dtype)
        self.states = [TrainState({"net": self._learner(level)}) for level in self.levels]
        self.steps = [self._step(level, setting) for level in self.levels]

    def _learner(self, level: Denoiser) -> Learner:
        averages = {f"{std:g}": partial(power_decay, std) for std in (0.05, 0.10)}
        return Learner(nn.ModuleList([level.net, level.logvar]), (0.9, 0.99), averages)

    def _step(self, level: Denoiser, setting: Setting) -> DenoisingStep:
        return DenoisingStep(
            denoiser=level,
            batches=Pictures(setting.resolution, setting.batch),
            statistics=Statistics((0.0,) * 3, (0.6,) * 3),
            draw_sigma=lambda batch, generator: lognormal_sigma(batch, -0.8, 1.4, generator),
            seed=0,
            batch_size=setting.batch,
            shards=1,
            lr=0.01,
            warmup_images=0,
            num_images=10**12,
            text_dropout=0.1,
            recorded=self.recorded,
            compiled=self.compiled,
        )

    def step(self) -> None:
        """One update of every level."""
        for step, state in zip(self.steps, self.states, strict=True):
            step(state)
            state.nimg += self.batch

    def update(self) -> None:
        """What follows the gradient."""
        for state in self.states:
            learner = state.learners["net"]
            average_gradient(learner.grad, 1, state.nimg)
            learner.update(0.01, state.nimg, self.batch)

    def gradients(self) -> None:
        """Any gradient."""
        for state in self.states:
            state.learners["net"].grad.normal_()


# --- Peers, and the plans that may be chosen for them. The first is what their own example trains.

PLANS: dict[str, list[tuple[tuple[int, ...], int]]] = {
    DIFFUSERS: [
        ((1, 1, 2, 2, 4, 4), 2),
        ((1, 2, 2, 2), 2),
        ((1, 2, 3, 4), 2),
        ((1, 2, 2, 2), 1),
        ((1, 2, 4), 1),
    ],
    DDPM: [((1, 2, 4, 8), 2), ((1, 2, 2, 4), 2), ((1, 2, 4), 2), ((1, 2, 2), 2)],
}
WIDTHS = (*range(8, 64, 4), *range(64, 513, 8))


def _diffusers(plan: Plan, resolution: int) -> nn.Module:
    """UNet2DModel as its example builds it: attention at the last level but one (at the last if there are few)."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    count = len(plan.multiples)
    attends = [i == (count - 2 if count > 4 else count - 1) for i in range(count)]
    net: nn.Module = UNet2DModel(
        sample_size=resolution,
        layers_per_block=plan.blocks,
        block_out_channels=tuple(plan.width * m for m in plan.multiples),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=math.gcd(32, plan.width),
    )
    return net


def _ddpm(plan: Plan, resolution: int, flash: bool = False) -> nn.Module:
    """Unet as its README builds it."""
    from denoising_diffusion_pytorch import Unet

    net: nn.Module = Unet(plan.width, dim_mults=plan.multiples, flash_attn=flash)
    return net


BUILDERS: dict[str, Callable[[Plan, int], nn.Module]] = {DIFFUSERS: _diffusers, DDPM: _ddpm}


Recipe = Callable[[nn.Module, torch.device], tuple[torch.optim.Optimizer, Callable[[], None]]]


class Peer:
    """A peer's network with the recipe of its own training script."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        setting: Setting,
        channels_last: bool,
        recipe: Recipe | None = None,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.setting, self.channels_last = setting, channels_last
        flash = {"flash": True} if name == DDPM and setting.device.type == "cuda" else {}
        self.net = BUILDERS[name](plan, setting.resolution, **flash).to(setting.device)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compiled:
            self.net.compile(dynamic=False)
        self.images = Pictures(setting.resolution, setting.batch).images
        self.optimizer, self.average = (recipe or RECIPES[name])(self.net, setting.device)
        angle = torch.linspace(0.01, math.pi / 2, 1000, device=setting.device)
        self.signal, self.noise = angle.cos(), angle.sin()

    def step(self) -> None:
        """One update."""
        setting, device = self.setting, self.setting.device
        images = self.images.to(device).float() / 127.5 - 1
        times = torch.randint(1000, (setting.batch,), device=device)
        noise = torch.randn_like(images)
        noisy = self.signal[times, None, None, None] * images + self.noise[times, None, None, None] * noise
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.dtype is torch.bfloat16):
            found = self.net(noisy, times)
        found = found if isinstance(found, Tensor) else found.sample
        F.mse_loss(found.float(), noise).backward()
        self.update()

    def update(self) -> None:
        """What follows the gradient."""
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()

    def gradients(self) -> None:
        """Any gradient."""
        for parameter in self.net.parameters():
            parameter.grad = torch.randn_like(parameter)


def diffusers_recipe(
    net: nn.Module, device: torch.device, fused: bool | None = None, foreach: bool | None = None
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Of its unconditional example; its foreach switch is on where it pays, on a GPU."""
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=fused
    )
    foreach = device.type == "cuda" if foreach is None else foreach
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=foreach)
    return optimizer, lambda: average.step(net.parameters())


def ddpm_recipe(
    net: nn.Module, device: torch.device, every: int = 10
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Of its Trainer: the average takes part in every tenth update."""
    from ema_pytorch import EMA

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(net, beta=0.995, update_every=every, update_after_step=0)
    return optimizer, average.update


RECIPES: dict[str, Recipe] = {DIFFUSERS: diffusers_recipe, DDPM: ddpm_recipe}


# --- Counting, and the search for plans.


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of `work`, products and sums each counted; attention as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count_parameters(module: nn.Module) -> int:
    """Numbers that the module holds as parameters."""
    return sum(p.numel() for p in module.parameters())


def own_cost(size: Size) -> Cost:
    """Of all levels, in one pass, without allocating them."""
    text = Pictures(1, 1).text.to("meta")
    with torch.device("meta"), torch.no_grad():
        top = build_levels(size)[-1]
        images = torch.zeros(1, 3, top.resolution, top.resolution)
        return Cost(count_parameters(top), flops(lambda: top(images, torch.ones(1), text)) / 2)


@cache
def peer_cost(name: str, plan: Plan, resolution: int) -> Cost:
    """Of a plan, without allocating it."""
    with torch.device("meta"), torch.no_grad():
        net = BUILDERS[name](plan, resolution)
        images, times = torch.zeros(1, 3, resolution, resolution), torch.zeros(1, dtype=torch.long)
        return Cost(count_parameters(net), flops(lambda: net(images, times)) / 2)


def plans_near(name: str, resolution: int, target: float, of: Callable[[Cost], float]) -> Iterator[Plan]:
    """For each kind of plan, the two widths about the target."""
    for multiples, blocks in PLANS[name]:
        if resolution >> (len(multiples) - 1) < 2:
            continue
        low, high = 0, len(WIDTHS) - 1
        while high - low > 1:
            middle = (low + high) // 2
            small = of(peer_cost(name, Plan(WIDTHS[middle], multiples, blocks), resolution)) < target
            low, high = (middle, high) if small else (low, middle)
        yield from (Plan(WIDTHS[i], multiples, blocks) for i in (low, high))


def choose(name: str, resolution: int, target: Cost, equal: str) -> Plan:
    """The first kind of plan that can be within 10% of the target; else what is nearest."""
    field_ = {"parameters": "parameters", "multiply-adds": "macs"}[equal]
    goal = getattr(target, field_)

    def distance(plan: Plan) -> float:
        return abs(getattr(peer_cost(name, plan, resolution), field_) / goal - 1)

    found = []
    for plan in plans_near(name, resolution, goal, lambda cost: getattr(cost, field_)):
        if distance(plan) <= TOLERANCE:
            return plan
        found.append(plan)
    return min(found, key=distance)


# --- Contenders.

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
        say(f"{name}: {chosen[name]}")
    if setting.device.type == "cuda":
        plain = replace(chosen[OURS], recorded=False)
        chosen[plain.label] = plain
    return chosen


def trial(choice: Choice, setting: Setting) -> float:
    """Seconds for an update, the best of a few."""
    step = choice.make(setting).step
    return min(seconds_of(step, setting.device, 1) for _ in range(4))


# --- Timing.

started = time.perf_counter()


def say(what: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - started:4.0f} s] {what}", file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds for one of `count`."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / count


def runner(work: Callable[[], object], setting: Setting, gain: float) -> Run:
    """A run of about setting.seconds that says `gain` per second of one work."""
    seconds_of(work, setting.device, 1)
    count = max(1, round(setting.seconds / seconds_of(work, setting.device, 1)))
    return lambda: gain / seconds_of(work, setting.device, count)


def peaks(setting: Setting) -> dict[str, Run]:
    """Runs of a 3x3 convolution in channels_last and of a product of matrices: FLOP/s."""
    device, dtype = setting.device, setting.dtype
    batch, channels, side, order = (64, 512, 64, 8192) if device.type == "cuda" else (16, 256, 32, 2048)
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    a, b = (torch.randn(order, order, device=device, dtype=dtype) for _ in range(2))
    return {
        "3x3 convolution": runner(lambda: F.conv2d(x, w, padding=1), setting, 18.0 * x.numel() * channels),
        "matmul": runner(lambda: a @ b, setting, 2.0 * order**3),
    }


class Built(NamedTuple):
    """A contender, and what one update of it takes."""

    contender: Contender
    flops: int  # for one image
    bytes: int | None  # at its peak


def weighed(choice: Choice, setting: Setting, weigh: bool) -> Built:
    """Build and count; bytes are of a GPU's allocations, or of a fresh process beyond its imports'."""
    if setting.device.type == "cpu":
        taken = resident(choice, setting) if weigh else None
        return Built(choice.make(setting), choice.training_flops(setting), taken)
    gc.collect()
    before = torch.cuda.memory_allocated()
    contender = choice.make(setting)
    torch.cuda.reset_peak_memory_stats()
    contender.step()
    taken = torch.cuda.max_memory_allocated() - before
    built = Built(contender, flops(contender.step) // setting.batch, taken)
    say(f"{choice.label}: built")
    return built


def resident(choice: Choice, setting: Setting) -> int:
    """Bytes of a fresh process at the peak of an update, beyond its imports'."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, choice, setting, torch.get_num_threads()).result()


def _resident(choice: Choice, setting: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    own = isinstance(choice.plan, Size)
    small = replace(choice, plan=TINY.upto(8) if own else Plan(8, (1, 2)))
    small.make(replace(setting, resolution=8, batch=1))  # imports count for nobody
    before = _status("VmRSS")
    contender = choice.make(setting)
    contender.step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, of this process alone; what getrusage says holds the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# --- Tables.


def compiled_too(
    chosen: dict[str, Choice], built: dict[str, Built], setting: Setting, deadline: float
) -> dict[str, Built]:
    """The contenders compiled, as long as there is time; one that cannot be compiled says why, and is left out."""
    made: dict[str, Built] = {}
    for label, choice in chosen.items():
        compiled = replace(choice, compiled=True)
        if not choice.recorded:
            continue
        if time.perf_counter() - started > deadline:
            say(f"{compiled.label}: no time left to compile")
            continue
        try:
            made[compiled.label] = built[label]._replace(contender=compiled.make(setting), bytes=None)
        except Exception as error:  # of any kind: compilers fail in many ways, and the table is worth having
            say(f"{compiled.label}: {type(error).__name__}: {str(error)[:200]}")
            continue
        say(f"{compiled.label}: compiled")
    return made


def step_table(size: Size, setting: Setting, equal: str, deadline: float = 0.0, weigh: bool = True) -> str:
    """Updates of all contenders at equal parameters or multiply-adds; compiled ones too up to the deadline."""
    chosen = choices(size, setting, equal)
    built = {name: weighed(choice, setting, weigh) for name, choice in chosen.items()}
    built |= compiled_too(chosen, built, setting, deadline) if deadline else {}
    for each in built.values():
        for _ in range(WARM_UP):
            each.contender.step()
    runs = {label: runner(each.contender.step, setting, setting.batch) for label, each in built.items()}
    rates = interleave(runs | peaks(setting), setting.repeats)
    costs = {
        str(choice.plan): choice.cost(setting.resolution) for choice in chosen.values() if choice.recorded
    }
    best = {name: statistics.median(rates[name]) for name in ("3x3 convolution", "matmul")}
    top, base = max(best.values()), DIFFUSERS if DIFFUSERS in rates else OURS

    sheet = next((v for k, v in DATASHEET.items() if k in device_name(setting.device)), None)
    sheet = sheet if setting.dtype is torch.bfloat16 else None
    headers = ["update", "network", "parameters", "GMAC", "GFLOP", "images/s", "ratio", "GFLOP/s", "of peak"]
    headers += ["of datasheet"] if sheet else []
    headers += ["MiB"]
    lines = []
    for label in [*CONTENDERS, *(label for label in built if label not in CONTENDERS)]:
        if label not in built:
            lines.append(absent(label, headers))
            continue
        choice, each = chosen[label.removesuffix(", compiled")], built[label]
        speed, cost = statistics.median(rates[label]) * each.flops, costs[str(choice.plan)]
        lines.append(
            [
                label,
                str(choice),
                f"{cost.parameters / 1e6:.2f}M",
                significant(cost.macs / 1e9),
                significant(each.flops / 1e9),
                show(rates[label]),
                f"{ratio(rates[label], rates[base]):.2f}x",
                significant(speed / 1e9),
                f"{speed / top:.2f}",
                *([f"{speed / sheet:.2f}"] if sheet else []),
                "" if each.bytes is None else f"{each.bytes / 2**20:,.0f}",
            ]
        )
    measured = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in best.items())
    title = f"Equal {equal}: {_words(setting)}. Peak, GFLOP/s: {measured}."
    return f"{title}\n\n{table(headers, lines)}"


def update_table(size: Size, setting: Setting) -> str:
    """What follows the gradient, at equal parameters: milliseconds."""
    target = own_cost(size.upto(setting.resolution))
    plans = build(
        {name: partial(choose, name, setting.resolution, target, "parameters") for name in BUILDERS}
    )
    makers: dict[str, Callable[[], Contender]] = {
        f"{OURS}: projections, Adam, 2 averages": lambda: Crescendo(size.upto(setting.resolution), setting)
    }
    for label, (name, recipe) in UPDATES.items():
        makers[label] = partial(_with_recipe, name, plans.get(name), setting, recipe)
    contenders = build(makers)
    for contender in contenders.values():
        contender.gradients()
    runs = {label: _milliseconds(contender, setting) for label, contender in contenders.items()}
    said = interleave(runs, setting.repeats)
    first = next(iter(UPDATES))
    base = said[first if first in said else next(iter(said))]
    headers = ["after the gradient", "ms", "ratio"]
    lines = [
        [label, show(said[label]), f"{ratio(said[label], base):.2f}x"]
        if label in said
        else absent(label, headers)
        for label in makers
    ]
    return f"Optimizer and averages alone: {_words(setting)}.\n\n{table(headers, lines)}"


def _with_recipe(name: str, plan: Plan | None, setting: Setting, recipe: Recipe) -> Peer:
    if plan is None:
        raise ModuleNotFoundError(name)
    return Peer(name, plan, setting, False, recipe)


def _milliseconds(contender: Contender, setting: Setting) -> Run:
    def work() -> None:
        contender.gradients()
        contender.update()

    seconds_of(work, setting.device, 1)
    count = max(2, round(setting.seconds / 4 / seconds_of(work, setting.device, 1)))

    def run() -> float:
        fill = seconds_of(contender.gradients, setting.device, count)
        return (seconds_of(work, setting.device, count) - fill) * 1000

    return run


UPDATES: dict[str, tuple[str, Recipe]] = {
    "diffusers: clipping, AdamW, EMAModel": (DIFFUSERS, diffusers_recipe),
    "diffusers, fused and foreach": (DIFFUSERS, partial(diffusers_recipe, fused=True, foreach=True)),
    "ddpm-pytorch: clipping, Adam, EMA every 10th": (DDPM, ddpm_recipe),
    "ddpm-pytorch, EMA every time": (DDPM, partial(ddpm_recipe, every=1)),
}


def _words(setting: Setting) -> str:
    kind = str(setting.dtype).removeprefix("torch.")
    return f"{setting.resolution} px, batch {setting.batch}, {kind}"


def device_name(device: torch.device) -> str:
    """The model of a GPU, or nothing."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def profile(size: Size, setting: Setting, rows: int = 25, steps: int = 5) -> str:
    """Where our update spends its time, by torch.profiler: the operations of the most time of their own."""
    contender = Choice(OURS, size.upto(setting.resolution)).make(setting)
    seconds_of(contender.step, setting.device, 3)
    with torch.profiler.profile() as profiler:
        whole = seconds_of(contender.step, setting.device, steps)
    gpu = setting.device.type == "cuda"
    times = {
        e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in profiler.key_averages()
    }
    calls = {e.key: e.count for e in profiler.key_averages()}
    total = sum(times.values())
    lines = [
        [
            key[:60],
            f"{times[key] / total:.1%}",
            f"{times[key] / steps / 1000:.2f}",
            f"{calls[key] / steps:.0f}",
        ]
        for key in sorted(times, key=lambda key: -times[key])[:rows]
    ]
    title = f"An update, profiled: {_words(setting)}; {whole * 1000:.1f} ms."
    return f"{title}\n\n{table(['operation', 'of its own', 'ms', 'calls'], lines)}"


def tables(args: argparse.Namespace) -> Iterator[str]:
    """The tables that were asked for, one by one."""
    gpu = args.device == "cuda"
    size = SIZES[args.size or ("small" if gpu else "demo")]()
    kinds = [args.dtype] if args.dtype else ["bfloat16"] if gpu else ["bfloat16", "float32"]
    for resolution in args.resolution or ([64, 128] if gpu else [64]):
        batch = args.batch or ((128 if resolution <= 64 else 64) if gpu else 16)
        for kind in kinds:
            device, dtype = torch.device(args.device), getattr(torch, kind)
            setting = Setting(device, dtype, resolution, batch, args.seconds, args.repeats)
            deadline = args.budget if resolution in (args.compile or []) else 0.0
            for equal in args.only or TABLES:
                say(f"{equal}: {_words(setting)}")
                if equal == "update":
                    if (resolution, kind) == ((args.resolution or [64])[0], kinds[0]):
                        yield update_table(size, setting)
                else:
                    yield step_table(size, setting, equal, deadline if equal == "parameters" else 0.0)
                gc.collect()
                if gpu:
                    torch.cuda.empty_cache()


def main() -> None:
    """Print tables, or the profile."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="of our networks; demo on a CPU, small on a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--resolution", type=int, nargs="*", help="px")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--only", choices=TABLES, nargs="*")
    parser.add_argument("--compile", type=int, nargs="*", help="px at which compiled networks take part too")
    parser.add_argument(
        "--budget", type=float, default=120, help="seconds after which nothing more is compiled"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="file to which finished tables are added")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if args.profile:
        size = SIZES[args.size or "demo"]()
        kind = getattr(torch, args.dtype or "bfloat16")
        setting = Setting(torch.device(args.device), kind, (args.resolution or [64])[0], args.batch or 16)
        print(profile(size, setting))
        return
    name = device_name(torch.device(args.device))
    for text in chain([machine(PACKAGES) + (f" {name}." if name else "")], tables(args)):
        print(f"{text}\n", flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(f"{text}\n\n")


if __name__ == "__main__":
    main()
