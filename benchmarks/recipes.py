"""What the presets need and cost as whole recipes: memory, float operations of each stage, hours at a stated rate.

    python -m benchmarks.recipes [--presets small base]

Counted without allocating anything, from the values that a preset writes into params.yaml: float operations as
`crescendo plan` counts them, memory by `benchmarks.scale`. Hours are an estimate: at the rate that was measured for
the preset `small` at 128 px on one H100 (docs/log.md, 2026-11-27), or for a core of this size on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import table
from benchmarks.scale import Shape, built, memory_of
from pipeline.config.params import Params, parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.models.denoiser import pyramid_levels
from pipeline.overview.counting import Data, count_stages
from pipeline.presets import presets

ROOT = Path(__file__).resolve().parents[1]
H100, UTILISATION = 989e12, 0.09  # FLOP/s in bfloat16 by the datasheet, and the part that `small` reached
TWO_CORES = 0.114e12  # FLOP/s, of 57 GFLOP/s a thread
WORKERS = 8  # among which the state may be sharded
ON_CPU = ("cpu-demo", "demo-256")
MEASURED = {"demo-256": "26 minutes of two cores of an AMD EPYC, from preparing to promotion"}


class Recipe(NamedTuple):
    """A preset's costs."""

    memory: (
        float  # GiB, the most of any stage: weights, gradient, optimizer, averages, activations of a shard
    )
    sharded: float  # the same on each of WORKERS workers with shard_state
    flops: dict[str, float]  # of each stage

    @property
    def total(self) -> float:
        """Float operations of all stages."""
        return sum(self.flops.values())


def preset_params(name: str) -> Params:
    """params.yaml with the values of a preset."""
    tree = _merged(read_yaml(ROOT / "params.yaml"), read_yaml(ROOT / "presets" / f"{name}.yaml"))
    return parse_params(tree, f"params.yaml with presets/{name}.yaml")


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {
        key: _merged(tree[key], value) if isinstance(value, Mapping) and key in tree else value
        for key, value in changes.items()
    }
    return {**tree, **merged}


def recipe_of(params: Params) -> Recipe:
    """Count a recipe."""
    core = params.core.model_dump(mode="json", exclude={"resolution"})
    shape = Shape(core, tuple(params.shell.nets()), params.core.resolution)
    levels = [
        memory_of(level) for level in pyramid_levels(built(shape, params.data.resolution, torch.bfloat16))
    ]
    sections = [params.pretrain] + [params.finetune] * (len(levels) - 1)
    needs = [
        (level.state + level.activations * section.batch_size // section.shards, level.sharded)
        for level, section in zip(levels, sections, strict=True)
    ]
    loads = count_stages(params, Data.planned(params))
    return Recipe(
        max(memory for memory, _ in needs) / 2**30,
        max(memory - sharded * (WORKERS - 1) // WORKERS for memory, sharded in needs) / 2**30,
        {stage: load.flops for stage, load in loads.items()},
    )


def hours(recipe: Recipe) -> str:
    """Estimated hours of one H100, two digits."""
    value = recipe.total / (H100 * UTILISATION) / 3600
    return f"{float(f'{value:.2g}'):g}"


def summary(name: str, recipe: Recipe) -> list[str]:
    """The lines that a preset's file has on its needs and costs."""
    shares = ", ".join(f"{stage} {flops / recipe.total:.0%}" for stage, flops in recipe.flops.items())
    costs = f"Costs {recipe.total:.1e} float operations, counted: {shares}"
    if name in MEASURED:
        return [costs, f"Measured: {MEASURED[name]}"]
    if name in ON_CPU:
        minutes = recipe.total / TWO_CORES / 60
        rate = f"{TWO_CORES / 1e12:.2g} TFLOP/s; nobody has measured it"
        return [costs, f"Estimate: {minutes:.0f} minutes of two CPU cores at {rate}"]
    rate = f"{UTILISATION:.0%} of its {H100 / 1e12:.0f} TFLOP/s; nobody has measured it"
    return [
        f"Needs {max(round(recipe.memory), 1)} GiB of GPU memory, counted",
        costs,
        f"Estimate: {hours(recipe)} hours of one H100 at {rate}",
    ]


def rows(names: Sequence[str]) -> list[list[str]]:
    """A line of the table for each preset."""
    lines = []
    for name in names:
        recipe = recipe_of(preset_params(name))
        parts = [f"{flops:.1e}" for flops in recipe.flops.values()]
        time = "" if name in ON_CPU else hours(recipe)
        memory = f"{recipe.memory:.1f}", f"{recipe.sharded:.1f}"
        lines.append([name, *memory, *parts, f"{recipe.total:.1e}", time])
    return lines


def main() -> None:
    """Print the table, and each preset's lines."""
    known = list(presets(ROOT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--presets", choices=known, nargs="*", default=known)
    names = parser.parse_args().presets
    stages = ("pretrain", "finetune", "refine", "evaluate")
    memory = "GiB", f"sharded over {WORKERS}"
    headers = ("preset", *memory, *stages, "FLOP", f"H100 hours at {UTILISATION:.0%}, estimated")
    print(table(headers, rows(names)))
    for name in names:
        print(f"\n{name}", *summary(name, recipe_of(preset_params(name))), sep="\n    ")


if __name__ == "__main__":
    main()
