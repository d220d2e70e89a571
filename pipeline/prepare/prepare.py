"""The prepare stage: from a source of images to validated shards, captions and their vectors.

Every item ends as exactly one of ok, quarantined or duplicate. Unusable files keep their bytes in
`data/quarantine/<code>/`, with the reasons in `report.jsonl` there. Equal input gives equal bytes in
`data/prepared`, `data/quarantine` and `reports/prepare`; only the Data Docs hold times.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config.params import Data, Params
from pipeline.errors import BadData
from pipeline.prepare import shards, validation
from pipeline.prepare.ingest import (
    Layout,
    TaskMapper,
    cache_key,
    ingest,
    run_locally,
    stored_images,
    stored_sums,
)
from pipeline.prepare.intake import (
    DATA_DOCS,
    PREPARED,
    QUARANTINE,
    Inspection,
    SortedItems,
    families,
    make_records,
    select,
    sort_out,
)
from pipeline.prepare.reports import _write_reports, problems_of, quarantine, thumbnails
from pipeline.prepare.sources.load import open_source
from pipeline.prepare.splits import FRACTIONS, assign_splits
from pipeline.prepare.validation import Report
from pipeline.text.load import load_text_encoder

Progress = Callable[[str, int, int], None]  # (what, done, total)


def _silent(what: str, done: int, total: int) -> None:
    return None


def prepare(
    params: Params,
    root: Path,
    work: Path,
    spread: TaskMapper = run_locally,
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
        pictures, sums = stored_images(ok), stored_sums(ok)
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
        found = examine(params, root, Path(scratch), docs, run_locally, processes, _silent)
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
    spread: TaskMapper,
    processes: int,
    progress: Progress,
) -> Inspection:
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
    return Inspection(source, listing.notes, intake, bases, splits, encoder, encoding, report)


def gate_intake(intake: SortedItems, data: Data) -> None:
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
