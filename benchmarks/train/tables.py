"""Tables of whole updates, of what follows the gradient, and the profile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.measure import Run, absent, build, interleave, ratio, show, significant, table
from benchmarks.train.contenders import Built, Choice, Contender, choices, weighed
from benchmarks.train.counting import choose, own_cost
from benchmarks.train.crescendo import Crescendo
from benchmarks.train.peers import BUILDERS, Peer, Recipe, ddpm_recipe, diffusers_recipe
from benchmarks.train.settings import CONTENDERS, DDPM, DIFFUSERS, OURS, Plan, Setting, Size
from benchmarks.train.timing import log, peaks, runner, seconds_of, started
from pipeline.training.cuda_graphs import WARM_UP

DATASHEET = {"H100": 989e12, "H200": 989e12}  # bf16, dense, FLOP/s


def compiled_too(
    chosen: dict[str, Choice], built: dict[str, Built], setting: Setting, deadline: float
) -> dict[str, Built]:
    """The contenders compiled, as long as there is time; one that cannot be compiled is logged and left out."""
    built_compiled: dict[str, Built] = {}
    for label, choice in chosen.items():
        compiled = replace(choice, compiled=True)
        if not choice.recorded:
            continue
        if time.perf_counter() - started > deadline:
            log(f"{compiled.label}: no time left to compile")
            continue
        try:
            built_compiled[compiled.label] = built[label]._replace(
                contender=compiled.make(setting), bytes=None
            )
        except Exception as error:  # compilers fail in many ways, and the others are worth their lines
            log(f"{compiled.label}: {type(error).__name__}: {str(error)[:200]}")
            continue
        log(f"{compiled.label}: compiled")
    return built_compiled


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
    title = f"Equal {equal}: {words(setting)}. Peak, GFLOP/s: {measured}."
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
    results = interleave(runs, setting.repeats)
    first = next(iter(UPDATES))
    base = results[first if first in results else next(iter(results))]
    headers = ["after the gradient", "ms", "ratio"]
    lines = [
        [label, show(results[label]), f"{ratio(results[label], base):.2f}x"]
        if label in results
        else absent(label, headers)
        for label in makers
    ]
    return f"Optimizer and averages alone: {words(setting)}.\n\n{table(headers, lines)}"


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


def words(setting: Setting) -> str:
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
    title = f"An update, profiled: {words(setting)}; {whole * 1000:.1f} ms."
    return f"{title}\n\n{table(['operation', 'of its own', 'ms', 'calls'], lines)}"
