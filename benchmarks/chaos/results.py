"""Results of campaigns, a JSON line for each batch, and the table of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Findings:
    """What a batch has found. counts: of what was tried and seen. failures: a line for each broken promise."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def require(self, held: bool, line: str) -> None:
        """Note a promise that was not kept."""
        if not held:
            self.failures.append(line)


@dataclass(frozen=True)
class Batch:
    """One batch: its campaign, store and seed, what it found, and its seconds, of the clock and of processors (of
    all processes but servers)."""

    campaign: str
    store: str
    seed: int
    counts: dict[str, int]
    failures: list[str]
    seconds: float
    cpu: float
    commit: str


def read(file: Path) -> list[Batch]:
    """All batches of a file, none where there is no file. A line that was cut by a kill is passed over."""
    batches = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            batches.append(Batch(**json.loads(line)))
        except (ValueError, TypeError):
            print(f"{file}: a line is no result, and is passed over: {line[:60]!r}")
    return batches


def append(file: Path, batch: Batch) -> None:
    """Add a batch to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with open(file, "a", encoding="utf-8") as out:
        out.write("\n" * torn + json.dumps(asdict(batch), sort_keys=True) + "\n")


def table(batches: Iterable[Batch]) -> str:
    """Markdown: a row for each campaign and store, with sums over its batches."""
    groups: dict[tuple[str, str], list[Batch]] = {}
    for batch in batches:
        groups.setdefault((batch.campaign, batch.store), []).append(batch)
    lines = ["| campaign | store | seeds | counts | failures | CPU |", "|---|---|---|---|---|---|"]
    lines += [_row(campaign, store, group) for (campaign, store), group in groups.items()]
    return "\n".join(lines)


def _row(campaign: str, store: str, group: list[Batch]) -> str:
    counts: Counter[str] = sum((Counter(batch.counts) for batch in group), Counter())
    shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    failures = sum(len(batch.failures) for batch in group)
    cpu = sum(batch.cpu for batch in group)
    seeds = ranges(batch.seed for batch in group)
    return f"| {campaign} | {store} | {seeds} | {shown} | {failures} | {cpu:,.0f} s |"


def ranges(numbers: Iterable[int]) -> str:
    """As in `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
