"""What the prepare stage shows of the data: quarantine, contact sheet, Data Docs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import artifacts
from pipeline.config.params import Data
from pipeline.errors import BadData
from pipeline.prepare import shards, validation
from pipeline.prepare.framing import Pixels, tile
from pipeline.prepare.ingest import IngestedItem, pictures_of
from pipeline.prepare.intake import DATA_DOCS, REPORTS, Inspection
from pipeline.prepare.sources.source import Item, Source

SHEET = {"train": 64, "val": 16, "test": 32}  # Pictures of each split on the contact sheet,
MAX_KEPT = 2**30  # bytes of a file that is put into quarantine
SHEET_COLUMNS = 16
SHEET_PIXELS = 96  # none larger than this.


def quarantine(place: Path, found: Inspection) -> None:
    """Write the quarantine folder: the bytes of every unusable file, and report.jsonl for all left out."""
    with artifacts.commit_directory(place) as folder:
        rows = []
        for taken in found.intake.quarantined:
            problem, where = _problem(taken), taken.item.where
            row = {"action": "quarantined", "code": problem.code, "file": where, "reason": str(problem)}
            rows.append(row | _keep(found.source, taken.item, folder, problem.code))
        for taken, original in found.intake.duplicates:
            reason = f"has the same pixels as {original.item.where}"
            rows.append(
                {"action": "duplicate", "code": "DUPLICATE", "file": taken.item.where, "reason": reason}
            )
        for note in found.notes:
            rows.append({"action": "note", "code": note.code, "file": note.where, "reason": str(note)})
        (folder / "report.jsonl").write_text(shards.dump_lines(rows), "ascii")


def _problem(taken: IngestedItem) -> BadData:
    assert taken.problem is not None
    return taken.problem


def _keep(source: Source, item: Item, folder: Path, code: str) -> dict[str, Any]:
    """Write an item's bytes to `<code>/<sha256>.<ext>`; what is no plain file has none."""
    try:
        content = source.read(item, MAX_KEPT)
    except BadData:
        return {"sha256": None, "kept": None}
    name = hashlib.sha256(content).hexdigest()
    suffix = Path(item.id).suffix.lower()
    kept = Path(code, name + (suffix if suffix[1:].isalnum() and suffix.isascii() else ""))
    (folder / code).mkdir(exist_ok=True)
    (folder / kept).write_bytes(content)
    return {"sha256": name, "kept": kept.as_posix()}


def contact_sheet(found: Inspection) -> Pixels | None:
    """Some pictures of each split, evenly spaced: whole lines of train, then val, then test."""
    shown: list[IngestedItem] = []
    pictures: list[Pixels] = []
    split_of = [found.splits[base] for base in found.bases]
    for split, most in SHEET.items():
        numbers = [number for number, own in enumerate(split_of) if own == split]
        count = min(most, len(numbers))
        shown = [found.intake.ok[numbers[i * len(numbers) // count]] for i in range(count)]
        line = [_shrink(picture) for picture in pictures_of(shown)]
        pictures += line + [line[0] * 0 + 224] * (-count % SHEET_COLUMNS) if line else []
    return tile(pictures, SHEET_COLUMNS) if pictures else None


def _shrink(picture: Pixels) -> Pixels:
    if picture.shape[0] <= SHEET_PIXELS:
        return picture
    return np.asarray(Image.fromarray(picture).resize((SHEET_PIXELS, SHEET_PIXELS)), np.uint8)


def _write_reports(root: Path, data: Data, metrics: dict[str, Any], found: Inspection) -> None:
    reports = root / REPORTS
    reports.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(found)
    if sheet is not None:
        Image.fromarray(sheet).save(reports / "contact.png", compress_level=1)
    artifacts.write_atomic(reports / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    page = "../prepare/contact.png" if sheet is not None else None
    validation.write_index_page(
        root / DATA_DOCS,
        found.report,
        data.source,
        metrics["counts"],
        problems_of(found),
        page,
        thumbnails(found),
    )


def problems_of(found: Inspection) -> dict[str, list[str]]:
    """One line for each item that was left out, by code."""
    problems: dict[str, list[str]] = defaultdict(list)
    for taken in found.intake.quarantined:
        problems[_problem(taken).code].append(str(_problem(taken)))
    for taken, original in found.intake.duplicates:
        problems["duplicate"].append(f"{taken.item.where} has the same pixels as {original.item.where}")
    return dict(problems)


def thumbnails(found: Inspection) -> dict[str, str]:
    """PNG data URIs, by id, of the examples of failed expectations."""
    wanted = {name for outcome in found.report.outcomes if not outcome.success for name in outcome.examples}
    shown = [taken for taken in found.intake.ok if taken.item.id in wanted]
    uris = {}
    for taken, picture in zip(shown, pictures_of(shown), strict=True):
        file = io.BytesIO()
        Image.fromarray(_shrink(picture)).save(file, "PNG")
        uris[taken.item.id] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return uris
