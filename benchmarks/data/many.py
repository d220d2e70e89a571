"""Preparation, loading and evaluation of many small files: processor time and memory by their number.

    python -m benchmarks.data.many [--files 30000 300000] [--scratch FOLDER] [--out many.json] [--plot many.png]

The images are smoothed noise of 40 x 36 px, as PNG, JPEG and WebP in turn, each with a text file of one of 5,000
captions; they are prepared at 32 px. Then 1% more files are added, and all is prepared again. Memory is the sum
over all processes of what is their own and their part of what they share (PSS), once a second; processor time is
that of all processes. In `--scratch` the files of an earlier call are used again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.measure import significant, table
from pipeline.config.params import Params, load_params

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("png", "jpg", "webp")
PX, CAPTIONS, PER_FOLDER = 32, 5000, 1000
TICKS = 100  # of processor time a second (USER_HZ)


class Cost(NamedTuple):
    """Of a run: s of processor time, MiB at the highest."""

    cpu: float
    memory: float


def write_files(raw: Path, numbers: Iterable[int]) -> None:
    """Those of the images and captions below `raw` that are not there."""
    for number in numbers:
        path = raw / f"{number // PER_FOLDER:04d}" / f"{number:07d}.{KINDS[number % len(KINDS)]}"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 36), Image.Resampling.BICUBIC).save(path, quality=85)
        path.with_suffix(".txt").write_text(f"thing number {number % CAPTIONS}")


def many_params() -> Params:
    """The defaults, for a folder at PX px."""
    params = load_params(ROOT / "params.yaml")
    changes = {"source": "folder", "path": "data/raw", "subset": (), "resolution": PX}
    return params.model_copy(update={"data": params.data.model_copy(update=changes)})


def run_prepare(root: Path) -> None:
    """Prepare the files below `root`, in this process and one decoder."""
    from pipeline.prepare.prepare import prepare

    prepare(many_params(), root, root / "cache")


def run_load(root: Path) -> None:
    """Open the prepared set and read 200 batches of 128 training images."""
    from pipeline.data.dataset import Batches, PreparedDataset

    batches = Batches(PreparedDataset(root / "data/prepared"), "train", seed=0, batch_size=128, shards=1)
    for number in range(200):
        batches.at(number * 128, 0)


def run_evaluate(root: Path) -> None:
    """What `evaluate` reads of the set before it samples: statistics, caption sets, features of real images."""
    from pipeline.data.dataset import PreparedDataset
    from pipeline.data.statistics import measure_statistics
    from pipeline.evaluation.comparison import measure_real
    from pipeline.evaluation.conditions import build_caption_sets
    from pipeline.evaluation.features import randconv

    dataset = PreparedDataset(root / "data/prepared")
    measure_statistics(dataset, PX)
    build_caption_sets(dataset, 400, seed=0)
    measure_real(dataset, [randconv(PX)], seed=0)


RUNS = {"prepare": run_prepare, "load": run_load, "evaluate": run_evaluate}


def measured(name: str, root: Path) -> Cost:
    """What one of RUNS costs below `root`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data.many", "--run", name, "--scratch", str(root)]
    process = subprocess.Popen(command, cwd=ROOT)
    cpu: dict[int, float] = {}
    memory = 0.0
    while process.poll() is None:
        pids = _family(process.pid)
        cpu |= {pid: seconds for pid in pids if (seconds := _cpu_seconds(pid)) is not None}
        memory = max(memory, sum(map(_proportional_mib, pids)))
        time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return Cost(sum(cpu.values()), memory)


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = [int(child) for child in _read(pid, f"task/{pid}/children").split()]
    return [pid, *(each for child in children for each in _family(child))]


def _cpu_seconds(pid: int) -> float | None:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else None


def _proportional_mib(pid: int) -> float:
    lines = [line.split() for line in _read(pid, "smaps_rollup").splitlines()]
    return sum(int(line[1]) for line in lines if line[0] == "Pss:") / 1024


def measure(count: int, scratch: Path) -> dict[str, Cost]:
    """The costs of preparing `count` files, of preparing 1% more, and of loading and evaluating with them."""
    root = scratch / str(count)
    write_files(root / "data/raw", range(count))
    costs = {"prepare": measured("prepare", root)}
    write_files(root / "data/raw", range(count, count + count // 100))
    costs["add 1%"] = measured("prepare", root)
    return costs | {name: measured(name, root) for name in ("load", "evaluate")}


def costs_table(costs: dict[int, dict[str, Cost]]) -> str:
    """A line for each number of files: CPU s and MiB of each run, and the share of what 1% more took."""
    names = ("prepare", "add 1%", "load", "evaluate")
    headers = ["files", *(f"{name}: {what}" for name in names for what in ("CPU s", "MiB")), "1% to all"]
    lines = []
    for count, own in costs.items():
        figures = [f"{value:,.0f}" for name in names for value in own[name]]
        share = own["add 1%"].cpu / own["prepare"].cpu
        lines.append([f"{count:,}", *figures, f"{significant(100 * share)}%"])
    return table(headers, lines)


def plot(costs: dict[int, dict[str, Cost]], path: Path) -> None:
    """Processor time and memory over the number of files."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    thousands = [count / 1000 for count in costs]
    for axes, field, unit in zip(figure.subplots(1, 2), Cost._fields, ("CPU s", "MiB"), strict=True):
        for name in ("prepare", "add 1%"):
            axes.plot(thousands, [getattr(own[name], field) for own in costs.values()], "o-", label=name)
        axes.set(xlabel="thousand files", ylabel=unit)
        axes.set_xlim(0)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.many")
    parser.add_argument("--files", type=int, nargs="+", default=[30_000, 300_000])
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        RUNS[options.run](options.scratch)
        return
    with tempfile.TemporaryDirectory() as scratch:
        costs = {count: measure(count, options.scratch or Path(scratch)) for count in sorted(options.files)}
    if options.out:
        options.out.write_text(
            json.dumps({n: {k: c._asdict() for k, c in own.items()} for n, own in costs.items()})
        )
    if options.plot:
        plot(costs, options.plot)
    print(costs_table(costs), end="")


if __name__ == "__main__":
    main()
