"""The prepare stage: from a source of images to validated shards, captions and their vectors.

Every item ends as exactly one of ok, quarantined or duplicate. Unusable files keep their bytes in
`data/quarantine/<code>/`, with the reasons in `report.jsonl` there. Equal input gives equal bytes in
`data/prepared`, `data/quarantine` and `reports/prepare`; only the Data Docs hold times.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import io
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import artifacts
from pipeline.config import Data, Params
from pipeline.data import shards, validation
from pipeline.data.captions import text_flaws
from pipeline.data.encoders import TextEncoder, load_text_encoder
from pipeline.data.images import Pixels, tile
from pipeline.data.ingest import (
    Layout,
    Spread,
    Taken,
    cache_key,
    here,
    ingest,
    pictures_of,
    stored_pictures,
    stored_sums,
)
from pipeline.data.measure import Measured, near_duplicates
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
MAX_KEPT = 2**30  # bytes of a file that is put into quarantine
SHEET_COLUMNS = 16
SHEET_PIXELS = 96  # none larger than this.


def _silent(what: str, done: int, total: int) -> None:
    return None


@dataclass
class Intake:
    """Where every item went."""

    ok: list[Taken] = field(default_factory=list)
    quarantined: list[Taken] = field(default_factory=list)
    duplicates: list[tuple[Taken, Taken]] = field(default_factory=list)  # (left out, the one kept)

    def counts(self) -> dict[str, int]:
        """n_in = n_ok + n_quarantined + n_duplicate."""
        ok, bad, double = len(self.ok), len(self.quarantined), len(self.duplicates)
        return {"n_in": ok + bad + double, "n_ok": ok, "n_quarantined": bad, "n_duplicate": double}


@dataclass(frozen=True)
class Examined:
    """A source that was read, sorted out and validated; nothing of it is written yet but its Data Docs."""

    source: Source
    notes: tuple[BadData, ...]
    intake: Intake
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


def prepare(
    params: Params,
    root: Path,
    work: Path,
    spread: Spread = here,
    processes: int = 1,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Run the stage below `root` and return its metrics (those of `reports/prepare/metrics.json`).

    `work` is a folder for what is worth keeping between runs: decoded pictures and encoded captions. `spread`
    runs the decoding, here or on many machines, each worker with `processes` decoders.

    Raises:
        ConfigError, InputMissing: the source cannot be what `params.data` says.
        BadData: too many files are unusable, or a critical expectation failed. Quarantine and reports
            are written first; `data/prepared` stays as it was.
    """
    data = params.data
    found = examine(params, root, work, root / DATA_DOCS, spread, processes, progress)
    metrics, rows, ok = found.metrics(), found.rows(), found.intake.ok
    quarantine(root / QUARANTINE, found)
    _write_reports(root, data, metrics, found)
    gate_intake(found.intake, data)
    gate_report(found.report)
    meta: dict[str, Any] = {}
    with artifacts.commit_directory(root / PREPARED, meta) as folder:
        pictures, sums = stored_pictures(ok), stored_sums(ok)
        shards.write_images(folder, pictures, sums, len(ok), data.resolution, found.encoding)
        unique = shards.write_index(folder, rows, [taken.item.captions for taken in ok])
        shards.write_text(folder, unique, found.encoder, work / "captions")
        meta |= {
            "source": data.source,
            "licence": found.source.licence,
            "subset": list(data.subset),
            "seed": params.seed,
            "resolution": data.resolution,
            "fit": data.fit,
            "background": list(data.background),
            "text_encoder": found.encoder.info,
            "counts": metrics["counts"],
            "validation": found.report.as_meta(),
        }
    return metrics


def validation_digest(root: Path) -> str:
    """Digest of what the gate answered about `data/prepared`."""
    return str(artifacts.read_manifest(root / PREPARED)["meta"]["validation"]["digest"])


def check(params: Params, root: Path, docs: Path | None, say: Callable[[str], None]) -> None:
    """Say in a few lines what `prepare` would do, without doing it; write Data Docs to `docs` if given.

    Raises what `prepare` would raise.
    """
    data = params.data
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        found = examine(params, root, Path(scratch), docs, here, processes, _silent)
        metrics, problems = found.metrics(), problems_of(found)
        if docs is not None:
            counts = metrics["counts"]
            validation.write_index_page(
                docs, found.report, data.source, counts, problems, None, thumbnails(found)
            )
    counts = metrics["counts"]
    say(f"{data.source}: {counts['n_in']} images, {counts['n_ok']} usable, "
        f"{counts['n_quarantined']} to quarantine, {counts['n_duplicate']} duplicates")  # fmt: skip
    for code, lines in sorted(problems.items()):
        say(f"  {len(lines)} x {code}: {lines[0]}")
    for note in found.notes:
        say(f"  note: {note}")
    for outcome in (*found.report.failed("critical"), *found.report.failed("warning")):
        examples = f" ({', '.join(outcome.examples[:3])})" if outcome.examples else ""
        differ = f": {outcome.unexpected} differ{examples}" if outcome.unexpected else ""
        say(f"  {outcome.severity}: {outcome.name}{differ}")
    gate_intake(found.intake, data)
    gate_report(found.report)
    parts = ", ".join(f"{counts[name]} {name}" for name in FRACTIONS)
    say(f"prepare would write {parts} at {data.resolution} px, {metrics['captions']} captions")


def examine(
    params: Params,
    root: Path,
    work: Path,
    docs: Path | None,
    spread: Spread,
    processes: int,
    progress: Progress,
) -> Examined:
    """Read, decode, sort out, split and validate a source; see `prepare` for arguments and errors."""
    data = params.data
    source = open_source(data, root)
    listing = source.listing()
    items = select(listing.items, data.subset)
    encoding = shards.choose_encoding(data.encoding, len(items), data.resolution)
    layout = Layout(data.resolution, params.core.resolution, encoding)
    cache = work / "pictures" / cache_key(data, layout)[:16]
    taken = ingest(source, items, layout, cache, spread, processes, partial(progress, "images"))
    intake = sort_out(taken)
    bases = families(intake.ok)
    splits = assign_splits(bases, params.seed)
    captions = shards.unique_captions(taken.item.captions for taken in intake.ok)
    encoder = load_text_encoder(data.text_encoder, data.max_tokens, captions)
    progress("validation", 0, 1)
    records = make_records(intake.ok, bases, splits, encoder)
    report = validation.validate(records, data.resolution, data.max_tokens, docs)
    progress("validation", 1, 1)
    return Examined(source, listing.notes, intake, bases, splits, encoder, encoding, report)


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


def sort_out(taken: Iterable[Taken]) -> Intake:
    """Every item as ok, quarantined or duplicate; of equal pictures the first is kept."""
    intake = Intake()
    seen: dict[str, Taken] = {}
    for each in taken:
        if each.measured is None:
            intake.quarantined.append(each)
        elif each.measured.pixels in seen:
            intake.duplicates.append((each, seen[each.measured.pixels]))
        else:
            seen[each.measured.pixels] = each
            intake.ok.append(each)
    return intake


def families(taken: Sequence[Taken]) -> list[str]:
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


def _measured(taken: Taken) -> Measured:
    assert taken.measured is not None
    return taken.measured


def make_records(
    images: Sequence[Taken], bases: Sequence[str], splits: dict[str, str], encoder: TextEncoder
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


def gate_intake(intake: Intake, data: Data) -> None:
    """Raise BadData if nothing is usable, or more than `max_bad_fraction` is not."""
    counts = intake.counts()
    bad, total = counts["n_quarantined"], counts["n_in"]
    fix = f"see {QUARANTINE}/report.jsonl; repair or remove these files"
    first = f", first: {intake.quarantined[0].item.where}" if intake.quarantined else ""
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


def quarantine(place: Path, found: Examined) -> None:
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


def _problem(taken: Taken) -> BadData:
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


def contact_sheet(found: Examined) -> Pixels | None:
    """Some pictures of each split, evenly spaced: whole lines of train, then val, then test."""
    shown: list[Taken] = []
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


def _write_reports(root: Path, data: Data, metrics: dict[str, Any], found: Examined) -> None:
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


def problems_of(found: Examined) -> dict[str, list[str]]:
    """One line for each item that was left out, by code."""
    problems: dict[str, list[str]] = defaultdict(list)
    for taken in found.intake.quarantined:
        problems[_problem(taken).code].append(str(_problem(taken)))
    for taken, original in found.intake.duplicates:
        problems["duplicate"].append(f"{taken.item.where} has the same pixels as {original.item.where}")
    return dict(problems)


def thumbnails(found: Examined) -> dict[str, str]:
    """PNG data URIs, by id, of the examples of failed expectations."""
    wanted = {name for outcome in found.report.outcomes if not outcome.success for name in outcome.examples}
    shown = [taken for taken in found.intake.ok if taken.item.id in wanted]
    uris = {}
    for taken, picture in zip(shown, pictures_of(shown), strict=True):
        file = io.BytesIO()
        Image.fromarray(_shrink(picture)).save(file, "PNG")
        uris[taken.item.id] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return uris
