"""From examined images to records: duplicates and bad ones are sorted out, families found, splits drawn."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import BadData, ConfigError
from pipeline.prepare.ingest import IngestedItem
from pipeline.prepare.measure import ImageMeasures, near_duplicates
from pipeline.prepare.sources.source import Item, Source
from pipeline.prepare.splits import FRACTIONS
from pipeline.prepare.validation import Record, Report
from pipeline.text.captions import text_flaws
from pipeline.text.encoder import TextEncoder

PREPARED = "data/prepared"
QUARANTINE = "data/quarantine"
DATA_DOCS = "reports/data_docs"
REPORTS = "reports/prepare"


@dataclass
class SortedItems:
    """Where every item went."""

    ok: list[IngestedItem] = field(default_factory=list)
    quarantined: list[IngestedItem] = field(default_factory=list)
    duplicates: list[tuple[IngestedItem, IngestedItem]] = field(
        default_factory=list
    )  # (left out, the one kept)

    def counts(self) -> dict[str, int]:
        """n_in = n_ok + n_quarantined + n_duplicate."""
        ok, bad, double = len(self.ok), len(self.quarantined), len(self.duplicates)
        return {"n_in": ok + bad + double, "n_ok": ok, "n_quarantined": bad, "n_duplicate": double}


@dataclass(frozen=True)
class Inspection:
    """A source that was read, sorted out and validated; nothing of it is written yet but its Data Docs."""

    source: Source
    notes: tuple[BadData, ...]
    intake: SortedItems
    bases: list[str]  # of each usable picture: what stays in one split
    splits: dict[str, str]  # split of each base
    encoder: TextEncoder
    encoding: str
    report: Report

    def rows(self) -> list[dict[str, Any]]:
        """One row of index.jsonl a usable picture, without its captions."""
        return [
            {
                "id": taken.item.id,
                "split": self.splits[base],
                "base": base,
                "group": taken.item.group,
                "subgroup": taken.item.subgroup,
            }
            for taken, base in zip(self.intake.ok, self.bases, strict=True)
        ]

    def metrics(self) -> dict[str, Any]:
        """What reports/prepare/metrics.json holds."""
        rows = self.rows()
        return {
            "counts": self.intake.counts()
            | {name: sum(row["split"] == name for row in rows) for name in FRACTIONS},
            "families": len(self.splits),
            "captions": len({text for taken in self.intake.ok for text in taken.item.captions}),
            "failed_expectations": {name: len(self.report.failed(name)) for name in ("critical", "warning")},
        }


def select(items: Sequence[Item], subset: Sequence[str]) -> list[Item]:
    """Items whose group or subgroup is in `subset`; all of them where it is empty.

    Raises ConfigError for a name that selects nothing.
    """
    if not subset:
        return list(items)
    known = {item.group for item in items} | {item.subgroup for item in items}
    for name in subset:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            few = ", ".join(sorted(known)[:8])
            fix = f"did you mean {close[0]!r}?" if close else f"use names such as: {few}"
            problem = f"{name!r} is no group or subgroup of this source"
            raise ConfigError("E-CFG-012", "params.yaml: data.subset", problem, fix)
    return [item for item in items if item.group in subset or item.subgroup in subset]


def sort_out(taken: Iterable[IngestedItem]) -> SortedItems:
    """Every item as ok, quarantined or duplicate; of equal pictures the first is kept."""
    intake = SortedItems()
    seen: dict[str, IngestedItem] = {}
    for each in taken:
        if each.measured is None:
            intake.quarantined.append(each)
        elif each.measured.pixels in seen:
            intake.duplicates.append((each, seen[each.measured.pixels]))
        else:
            seen[each.measured.pixels] = each
            intake.ok.append(each)
    return intake


def families(taken: Sequence[IngestedItem]) -> list[str]:
    """What each picture must share a split with: the family it belongs to or, where the source knows none, that of
    its near duplicates (named by the first of them)."""
    first = list(range(len(taken)))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    free = [i for i, each in enumerate(taken) if each.item.base is None]
    for a, b in near_duplicates([_measured(taken[i]).phash for i in free]):
        low, high = sorted((root(free[a]), root(free[b])))
        first[high] = low
    return [each.item.base or _measured(taken[root(i)]).pixels[:16] for i, each in enumerate(taken)]


def _measured(taken: IngestedItem) -> ImageMeasures:
    assert taken.measured is not None
    return taken.measured


def make_records(
    images: Sequence[IngestedItem], bases: Sequence[str], splits: dict[str, str], encoder: TextEncoder
) -> list[Record]:
    """The table that is validated, one record an image."""
    names = [taken.item.captions[0] if taken.item.captions else None for taken in images]
    tokens = encoder.count_tokens([name or "" for name in names])
    texts = {text for taken in images for text in taken.item.captions}
    flaws = {text: text_flaws(text) for text in texts}
    twins: dict[int, set[str]] = defaultdict(set)  # splits of each picture's near duplicates
    for a, b in near_duplicates([_measured(taken).phash for taken in images]):
        if bases[a] != bases[b]:
            twins[a].add(splits[bases[b]])
            twins[b].add(splits[bases[a]])
    return [
        Record(
            id=taken.item.id,
            split=splits[base],
            base=base,
            group=taken.item.group,
            subgroup=taken.item.subgroup,
            caption=name,
            num_captions=len(taken.item.captions),
            caption_flaws=", ".join(sorted({flaw for text in taken.item.captions for flaw in flaws[text]})),
            tokens=count,
            near_elsewhere=len(twins[number] - {splits[base]}),
            aspect=round(max(_measured(taken)[1:3]) / min(_measured(taken)[1:3]), 4),
            side=int(min(_measured(taken)[1:3])),
            **_measured(taken)._asdict(),
        )
        for number, (taken, base, name, count) in enumerate(zip(images, bases, names, tokens, strict=True))
    ]
