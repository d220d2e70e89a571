"""Interleaved timing (A B A B), since the load of a shared machine changes, and Markdown tables.

Compare figures as ratios within one run, never as absolute times. A contender whose package is missing takes
no part; its line says "not installed".
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")
Run = Callable[[], float]  # does the work once and returns a rate or a time
Rates = list[float]

MISSING = "not installed"


def per_second(work: Callable[[], int]) -> Run:
    """A run that returns the rate of `work`, which returns the number of items that it processed."""

    def run() -> float:
        start = time.perf_counter()
        count = work()
        return count / (time.perf_counter() - start)

    return run


def build(makers: Mapping[Key, Callable[[], T]]) -> dict[Key, T]:
    """Call the makers; leave out those that lack a package."""
    built = {}
    for key, make in makers.items():
        try:
            built[key] = make()
        except ModuleNotFoundError:
            continue
    return built


def interleave(runs: Mapping[Key, Run], repeats: int) -> dict[Key, Rates]:
    """Results of each run, `repeats` times in turn, after one round of warm-up."""
    results: dict[Key, Rates] = {key: [] for key in runs}
    for number in range(repeats + 1):
        for key, run in runs.items():
            rate = run()
            if number:
                results[key].append(rate)
    return results


def ratio(rates: Rates, base: Rates) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def spread(rates: Rates) -> float:
    """Half the range, as a fraction of the median."""
    return (max(rates) - min(rates)) / 2 / statistics.median(rates)


def show(rates: Rates) -> str:
    """Median and spread, such as `1,234 ±5%`."""
    return f"{significant(statistics.median(rates))} ±{spread(rates):.0%}"


def significant(value: float) -> str:
    """Three significant digits, and every digit before the point: 0.123, 1.23, 12.3, 1,234."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned; the first column to the left, the others to the right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def absent(name: str, headers: Sequence[str]) -> list[str]:
    """The line of a contender that took no part."""
    return [name, MISSING, *[""] * (len(headers) - 2)]


def machine(packages: Iterable[str]) -> str:
    """One line: the processor, Python, and the versions of `packages`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")
    cores = sum(line.startswith("processor") for line in lines)
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    return f"{model}, {cores} cores; Python {platform.python_version()}, {versions}."


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
