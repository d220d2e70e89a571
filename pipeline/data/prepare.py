"""The prepare stage: from a source of images to validated shards, captions and their vectors.

Every item ends as exactly one of ok, quarantined or duplicate. Unusable files keep their bytes in
`data/quarantine/<code>/`, with the reasons in `report.jsonl` there. Equal input gives equal bytes in
`data/prepared`, `data/quarantine` and `reports/prepare`; only the Data Docs hold times.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import stat
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline import artifacts
from pipeline.config import Data, Params
from pipeline.data import shards, validation
from pipeline.data.captions import TextEncoder, load_text_encoder
from pipeline.data.images import Pixels, tile
from pipeline.data.sources import Item, Source, open_source
from pipeline.data.splits import FRACTIONS, assign_splits
from pipeline.data.validation import Record, Report
from pipeline.errors import BadData, ConfigError

Progress = Callable[[str, int, int], None]  # (what, done, total)

PREPARED = "data/prepared"
QUARANTINE = "data/quarantine"
DATA_DOCS = "reports/data_docs"
REPORTS = "reports/prepare"
SHEET = {"train": 64, "val": 16, "test": 32}  # Pictures of each split on the contact sheet,
SHEET_COLUMNS = 16
SHEET_PIXELS = 96  # none larger than this.


@dataclass(frozen=True)
class Kept:
    """A usable item and what is known of its pixels: their sha256, mean and standard deviation (0-255)."""

    item: Item
    pixels: str
    width: int
    height: int
    mean: float
    std: float

    @property
    def base(self) -> str:
        """The item's family; an image without one is a family of its own."""
        return self.item.base or self.pixels[:16]


@dataclass
class Intake:
    """Where every item went."""

    ok: list[Kept] = field(default_factory=list)
    quarantined: list[tuple[Item, BadData]] = field(default_factory=list)
    duplicates: list[tuple[Item, Item]] = field(default_factory=list)  # (left out, the one kept)

    def counts(self) -> dict[str, int]:
        """n_in = n_ok + n_quarantined + n_duplicate."""
        ok, bad, double = len(self.ok), len(self.quarantined), len(self.duplicates)
        return {"n_in": ok + bad + double, "n_ok": ok, "n_quarantined": bad, "n_duplicate": double}


def _silent(what: str, done: int, total: int) -> None:
    return None


def prepare(params: Params, root: Path, progress: Progress = _silent) -> dict[str, Any]:
    """Run the stage below `root` and return its metrics (those of `reports/prepare/metrics.json`).

    Raises:
        ConfigError, InputMissing: the source cannot be what `params.data` says.
        BadData: too many files are unusable, or a critical expectation failed. Quarantine and reports
            are written first; `data/prepared` stays as it was.
    """
    data = params.data
    source = open_source(data, root)
    listing = source.listing()
    items = select(listing.items, data.subset)
    encoder = load_text_encoder(data.text_encoder, data.max_tokens)
    meta: dict[str, Any] = {}
    with artifacts.commit_directory(root / PREPARED, meta) as folder:
        writer = shards.ShardWriter(folder)
        intake = take_in(source, items, writer, progress)
        writer.flush()
        quarantine(root / QUARANTINE, intake, listing.notes)
        gate_intake(intake, data)

        splits = assign_splits([kept.base for kept in intake.ok], params.seed)
        rows = [_row(kept, splits[kept.base]) for kept in intake.ok]
        captions = [kept.item.captions for kept in intake.ok]
        unique = shards.write_index(folder, rows, captions)
        shards.write_text(folder, unique, encoder, lambda done: progress("captions", done, len(unique)))

        progress("validation", 0, 1)
        records = make_records(intake.ok, splits, encoder)
        report = validation.validate(records, data.resolution, data.max_tokens, root / DATA_DOCS)
        progress("validation", 1, 1)
        counts = intake.counts() | {name: sum(row["split"] == name for row in rows) for name in FRACTIONS}
        metrics = {
            "counts": counts,
            "families": len(splits),
            "captions": sum(bool(text) for text in unique),
            "failed_expectations": {name: len(report.failed(name)) for name in ("critical", "warning")},
        }
        _write_reports(root, data, metrics, report, intake, contact_sheet(rows, writer))
        gate_report(report)
        meta |= {
            "source": data.source,
            "licence": source.licence,
            "subset": list(data.subset),
            "seed": params.seed,
            "resolution": data.resolution,
            "background": list(data.background),
            "text_encoder": encoder.info,
            "counts": counts,
            "validation": report.as_meta(),
        }
    return metrics


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


def take_in(source: Source, items: Sequence[Item], writer: shards.ShardWriter, progress: Progress) -> Intake:
    """Load every item once and hand the usable ones to `writer`; of equal pictures, the first."""
    intake = Intake()
    seen: dict[str, Item] = {}
    for number, item in enumerate(items, start=1):
        try:
            if item.flaw is not None:
                raise item.flaw
            pixels = source.load(item)
        except BadData as problem:
            intake.quarantined.append((item, problem))
        else:
            kept = _measure(item, pixels)
            if kept.pixels in seen:
                intake.duplicates.append((item, seen[kept.pixels]))
            else:
                seen[kept.pixels] = item
                intake.ok.append(kept)
                writer.add(pixels)
        progress("images", number, len(items))
    return intake


def _measure(item: Item, pixels: Pixels) -> Kept:
    height, width, _ = pixels.shape
    name = hashlib.sha256(pixels.tobytes()).hexdigest()
    return Kept(item, name, width, height, round(float(pixels.mean()), 4), round(float(pixels.std()), 4))


def _row(kept: Kept, split: str) -> dict[str, Any]:
    item = kept.item
    return {"id": item.id, "split": split, "base": kept.base, "group": item.group, "subgroup": item.subgroup}


def make_records(images: Sequence[Kept], splits: dict[str, str], encoder: TextEncoder) -> list[Record]:
    """The table that is validated, one record an image."""
    names = [kept.item.captions[0] if kept.item.captions else None for kept in images]
    tokens = encoder.count_tokens([name or "" for name in names])
    return [
        Record(
            id=kept.item.id,
            split=splits[kept.base],
            base=kept.base,
            group=kept.item.group,
            subgroup=kept.item.subgroup,
            caption=name,
            num_captions=len(kept.item.captions),
            tokens=count,
            width=kept.width,
            height=kept.height,
            mean=kept.mean,
            std=kept.std,
            pixels=kept.pixels,
        )
        for kept, name, count in zip(images, names, tokens, strict=True)
    ]


def gate_intake(intake: Intake, data: Data) -> None:
    """Raise BadData if nothing is usable, or more than `max_bad_fraction` is not."""
    counts = intake.counts()
    bad, total = counts["n_quarantined"], counts["n_in"]
    fix = f"see {QUARANTINE}/report.jsonl; repair or remove these files"
    first = f", first: {intake.quarantined[0][1].where}" if intake.quarantined else ""
    if not intake.ok:
        raise BadData("E-DAT-002", data.source, f"none of {total} images is usable{first}", fix)
    if bad > data.max_bad_fraction * total:
        problem = f"{bad} of {total} images are unusable, max_bad_fraction is {data.max_bad_fraction:g}"
        raise BadData("E-DAT-001", data.source, problem + first, fix + ", or raise data.max_bad_fraction")


def gate_report(report: Report) -> None:
    """Raise BadData if a critical expectation failed."""
    failed = report.failed("critical")
    if failed:
        first = failed[0]
        examples = f" (for example {', '.join(first.examples)})" if first.examples else ""
        problem = f"{len(failed)} critical expectations failed, first: {first.name}{examples}"
        raise BadData("E-DAT-003", PREPARED, problem, f"open {DATA_DOCS}/index.html and repair the data")


def quarantine(place: Path, intake: Intake, notes: Sequence[BadData]) -> None:
    """Write the quarantine folder: the bytes of every unusable file, and report.jsonl for all left out."""
    with artifacts.commit_directory(place) as folder:
        rows = []
        for item, problem in intake.quarantined:
            row = {"action": "quarantined", "code": problem.code, "file": item.where, "reason": str(problem)}
            rows.append(row | _keep(item, folder, problem.code))
        for item, original in intake.duplicates:
            reason = f"has the same pixels as {original.where}"
            rows.append({"action": "duplicate", "code": "DUPLICATE", "file": item.where, "reason": reason})
        for note in notes:
            rows.append({"action": "note", "code": note.code, "file": note.where, "reason": str(note)})
        (folder / "report.jsonl").write_text(shards.dump_lines(rows), "ascii")


def _keep(item: Item, folder: Path, code: str) -> dict[str, Any]:
    """Copy an item's bytes to `<code>/<sha256>.<ext>`; what is no plain file has none."""
    if not stat.S_ISREG(item.file.lstat().st_mode):
        return {"sha256": None, "kept": None}
    name = artifacts.sha256_file(item.file)
    suffix = item.file.suffix.lower()
    kept = Path(code, name + (suffix if suffix[1:].isalnum() and suffix.isascii() else ""))
    (folder / code).mkdir(exist_ok=True)
    with item.file.open("rb") as source, (folder / kept).open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    return {"sha256": name, "kept": kept.as_posix()}


def contact_sheet(rows: Sequence[dict[str, Any]], writer: shards.ShardWriter) -> Pixels:
    """Some pictures of each split, evenly spaced: whole lines of train, then val, then test."""
    pictures: list[Pixels] = []
    for split, most in SHEET.items():
        numbers = [number for number, row in enumerate(rows) if row["split"] == split]
        count = min(most, len(numbers))
        shown = [writer.read(numbers[i * len(numbers) // count]) for i in range(count)]
        shown = [_shrink(picture) for picture in shown]
        blanks = -count % SHEET_COLUMNS
        pictures += shown + [shown[0] * 0 + 224] * blanks if shown else []
    return tile(pictures, SHEET_COLUMNS)


def _shrink(picture: Pixels) -> Pixels:
    import numpy as np

    if picture.shape[0] <= SHEET_PIXELS:
        return picture
    return np.asarray(Image.fromarray(picture).resize((SHEET_PIXELS, SHEET_PIXELS)), np.uint8)


def _write_reports(
    root: Path, data: Data, metrics: dict[str, Any], report: Report, intake: Intake, sheet: Pixels
) -> None:
    reports = root / REPORTS
    reports.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(reports / "contact.png")
    artifacts.write_atomic(reports / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    problems: dict[str, list[str]] = defaultdict(list)
    for _, problem in intake.quarantined:
        problems[problem.code].append(str(problem))
    for item, original in intake.duplicates:
        problems["duplicate"].append(f"{item.where} has the same pixels as {original.where}")
    docs = root / DATA_DOCS
    counts, page = metrics["counts"], "../prepare/contact.png"
    validation.write_index_page(docs, report, data.source, counts, dict(problems), page)
