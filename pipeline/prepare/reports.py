"""What the prepare stage shows of the data: quarantine, contact sheet, Data Docs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import artifacts
from pipeline.config.params import Data
from pipeline.errors import BadData, StorageError
from pipeline.prepare import photos, shards, validation
from pipeline.prepare.framing import Pixels, centred, elongation, tile
from pipeline.prepare.ingest import IngestedItem, images_of
from pipeline.prepare.intake import DATA_DOCS, REPORTS, Inspection, SortedItems
from pipeline.prepare.sources.captions import FOLDER_NAMES
from pipeline.prepare.sources.files import listed
from pipeline.prepare.sources.source import Item, Source

SHEET = {"train": 64, "val": 16, "test": 32}  # images of each split on the contact sheet
SHEET_COLUMNS = 16
SHEET_PIXELS = 96  # side of the largest image on it
DARK = 64  # the largest value of an image that is nearly black; 14 bits in 16 reach it
MUCH = 1 / 3  # of an image's area that its bucket cuts off
MANY, NEARLY_ALL = 10, 0.9  # images with one caption, and their part of those with any, that are odd
MAX_KEPT = 2**30  # bytes of a file that is put into quarantine


def quarantine(place: Path, inspection: Inspection) -> None:
    """Write the quarantine folder: the bytes of every unusable file, and report.jsonl, a row per item left out."""
    with artifacts.commit_directory(place) as folder:
        rows = report_rows(inspection)
        unusable = inspection.items.quarantined
        for row, item in zip(rows[: len(unusable)], unusable, strict=True):
            row |= _keep(inspection.source, item.item, folder, _problem(item).code)
        (folder / "report.jsonl").write_text(shards.dump_lines(rows), "ascii")


def report_rows(inspection: Inspection) -> list[dict[str, Any]]:
    """A row for each item that is left out: first the unusable ones, then duplicates, then notes."""
    rows: list[dict[str, Any]] = []
    for item in inspection.items.quarantined:
        problem, where = _problem(item), item.item.where
        rows.append({"action": "quarantined", "code": problem.code, "file": where, "reason": str(problem)})
    for item, original in inspection.items.duplicates:
        reason = f"has the same pixels as {original.item.where}"
        rows.append({"action": "duplicate", "code": "DUPLICATE", "file": item.item.where, "reason": reason})
    for note in inspection.notes:
        rows.append({"action": "note", "code": note.code, "file": note.where, "reason": str(note)})
    return rows


def _problem(item: IngestedItem) -> BadData:
    assert item.problem is not None
    return item.problem


def _keep(source: Source, item: Item, folder: Path, code: str) -> dict[str, Any]:
    """Write an item's bytes to `<code>/<sha256>.<ext>`; there are none where it is not a plain file. Nothing is
    wrong with raw files and those that lack a plug-in, which stay where they are."""
    if code in {photos.RAW, photos.NO_PLUGIN}:
        return {"sha256": None, "kept": None}
    try:
        content = source.read(item, MAX_KEPT)
    except (BadData, StorageError, OSError):  # the row says why
        return {"sha256": None, "kept": None}
    name = hashlib.sha256(content).hexdigest()
    suffix = Path(item.id).suffix.lower()
    kept = Path(code, name + (suffix if suffix[1:].isalnum() and suffix.isascii() else ""))
    (folder / code).mkdir(exist_ok=True)
    (folder / kept).write_bytes(content)
    return {"sha256": name, "kept": kept.as_posix()}


def contact_sheet(inspection: Inspection) -> Pixels | None:
    """Some images of each split, evenly spaced: whole lines of train, then val, then test."""
    shown: list[IngestedItem] = []
    images: list[Pixels] = []
    split_of = [inspection.splits[family] for family in inspection.families]
    for split, limit in SHEET.items():
        numbers = [number for number, own in enumerate(split_of) if own == split]
        count = min(limit, len(numbers))
        shown = [inspection.items.ok[numbers[i * len(numbers) // count]] for i in range(count)]
        line = [_shrink(image) for image in images_of(shown)]
        images += line + [line[0] * 0 + 224] * (-count % SHEET_COLUMNS) if line else []
    side = max((max(image.shape) for image in images), default=0)
    images = [centred(image, side, (224, 224, 224)) for image in images]
    return tile(images, SHEET_COLUMNS) if images else None


def _shrink(image: Pixels) -> Pixels:
    height, width, _ = image.shape
    longest = max(height, width)
    if longest <= SHEET_PIXELS:
        return image
    size = (round(width * SHEET_PIXELS / longest), round(height * SHEET_PIXELS / longest))
    return np.asarray(Image.fromarray(image).resize(size), np.uint8)


def write_reports(root: Path, data: Data, metrics: dict[str, Any], inspection: Inspection) -> None:
    """Write the contact sheet, metrics.json and the index page of the Data Docs."""
    reports = root / REPORTS
    reports.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(inspection)
    if sheet is not None:
        Image.fromarray(sheet).save(reports / "contact.png", compress_level=1)
    artifacts.write_atomic(reports / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    page = "../prepare/contact.png" if sheet is not None else None
    validation.write_index_page(
        root / DATA_DOCS,
        inspection.report,
        data.source,
        metrics["counts"],
        problems_of(inspection),
        page,
        thumbnails(inspection),
    )


def problems_of(inspection: Inspection) -> dict[str, list[str]]:
    """{code: one line per item that was left out}."""
    problems: dict[str, list[str]] = defaultdict(list)
    for item in inspection.items.quarantined:
        problems[_problem(item).code].append(str(_problem(item)))
    for item, original in inspection.items.duplicates:
        problems["duplicate"].append(f"{item.item.where} has the same pixels as {original.item.where}")
    return dict(problems)


def findings(inspection: Inspection, data: Data) -> list[str]:
    """What a user should know of a source, a line each: its captions, files beside the images, failed attempts."""
    captions = captions_in_words((image.item for image in inspection.items.ok), data.captions)
    kinds = [
        f"{count} {kind or 'without a suffix'}" for kind, count in inspection.listing.passed_over.items()
    ]
    passed = [f"passed over, as no pictures: {listed(kinds, 20)}"] if kinds else []
    notes = notes_in_words(inspection.notes)
    sizes = [f"{count} of {width}x{height}" for height, width, count in inspection.buckets]
    buckets = [f"buckets: {listed(sizes, 12)} px"] if sizes else []
    pictures = pictures_in_words(inspection.items)
    if buckets:
        buckets += cropped_in_words(inspection.items)
    return [*captions, *buckets, *passed, *pictures, *notes, *attempts_in_words(inspection.items)]


def cropped_in_words(items: SortedItems) -> list[str]:
    """The images of which more than MUCH is cut off, since their shape is far from that of their bucket."""
    cut = {
        each.item.where: 1 - 1 / elongation(each.measured[1:3], each.size)
        for each in items.ok
        if each.measured
    }
    order = sorted(cut, key=lambda where: -cut[where])
    much = [f"{where} ({cut[where]:.0%})" for where in order if cut[where] > MUCH]
    if not much:
        return []
    files = "1 image is" if len(much) == 1 else f"{len(much)} images are"
    return [f"note: {files} cropped by more than a third to the shape of a bucket: {listed(much, 3)}"]


def pictures_in_words(items: SortedItems) -> list[str]:
    """What is odd about the files themselves: raw ones, several images in one, hardly any light."""
    lines = []
    if raw := [each.item.where for each in items.quarantined if _problem(each).code == photos.RAW]:
        lines.append(f"warning: {photos.raw_in_words(raw)}: {listed(raw, 3)}")
    odd = [
        (each.item.where, each.measured)
        for each in items.ok
        if each.measured is not None and (each.measured.several or each.measured.peak <= DARK)
    ]
    if several := [where for where, one in odd if one.several]:
        files = "1 file holds" if len(several) == 1 else f"{len(several)} files hold"
        lines.append(f"note: {files} several images, of which the first is taken: {listed(several, 3)}")
    if dark := [f"{where} ({one.peak})" for where, one in odd if one.peak <= DARK]:
        cause = "as where 10, 12 or 14 bits lie in 16 and are not scaled"
        lines.append(f"warning: {_images(dark)} no value above {DARK} of 255, {cause}: {listed(dark, 3)}")
    return lines


def captions_in_words(items: Iterable[Item], rule: str) -> list[str]:
    """Where the captions of usable items are from, and what is odd about that. `rule` is `data.captions`."""
    own = "the source's own"
    origins: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    without, foldered = [], []
    for item in items:
        if item.captions:
            origins[item.origin or own] += 1
            if item.origin == FOLDER_NAMES:
                foldered.append(item.where)
            texts[item.captions[0]] += 1
        else:
            without.append(item.where)
    captioned = origins.total()
    total = captioned + len(without)
    counts = [f"{count} from {origin}" for origin, count in origins.most_common()]
    lines = [f"captions of {total} images: {listed([*counts, f'{len(without)} without'], 12)}"]
    if without and rule != "none":
        lines.append(f"warning: {_images(without)} no caption: {listed(without, 3)}")
    if rule == "auto" and 0 < len(foldered) < captioned:
        fix = "data.captions: sidecar or metadata leaves them without"
        problem = f"{_images(foldered)} no caption but the name of the folder, unlike others"
        lines.append(f"warning: {problem} ({fix}): {listed(foldered, 3)}")
    text, count = max(texts.items(), key=lambda pair: pair[1], default=("", 0))
    if count >= MANY and count >= NEARLY_ALL * captioned:
        lines.append(f"warning: {count} of {total} images have one caption, {text[:80]!r}")
    return lines


def _images(names: Sequence[str]) -> str:
    return f"{len(names)} image has" if len(names) == 1 else f"{len(names)} images have"


def notes_in_words(notes: Sequence[BadData]) -> list[str]:
    """One line for each kind of note: the first, and how many there are."""
    kinds: dict[tuple[str, str], list[BadData]] = defaultdict(list)
    for note in notes:
        kinds[note.code, note.fix].append(note)
    return [
        f"note: {f'{len(alike)} like this: ' if len(alike) > 1 else ''}{alike[0]}" for alike in kinds.values()
    ]


def attempts_in_words(items: SortedItems) -> list[str]:
    """What could not be read or decoded this time though it may be all right, and what is there again."""
    lines = []
    if passing := [
        each for each in items.quarantined if each.passing and _problem(each).code != photos.NO_PLUGIN
    ]:
        names = listed([f"{each.item.where} ({_problem(each).problem})" for each in passing], 3)
        problem = f"{len(passing)} could not be read or decoded now"
        lines.append(f"{problem}; the next run tries again (dvc repro -f prepare): {names}")
    decoded = chain(items.ok, (double for double, _ in items.duplicates))
    if back := [each.item.where for each in decoded if each.earlier]:
        lines.append(f"{len(back)} that could not be read or decoded before are there again: {listed(back)}")
    return lines


def thumbnails(inspection: Inspection) -> dict[str, str]:
    """PNG data URIs, by id, of the examples of failed expectations."""
    wanted = {
        name for outcome in inspection.report.outcomes if not outcome.success for name in outcome.examples
    }
    shown = [item for item in inspection.items.ok if item.item.id in wanted] if wanted else []
    uris = {}
    for item, image in zip(shown, images_of(shown), strict=True):
        file = io.BytesIO()
        Image.fromarray(_shrink(image)).save(file, "PNG")
        uris[item.item.id] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return uris
