"""The prepare stage: from a source of images to validated shards, captions and their vectors.

Every item ends as exactly one of ok, quarantined or duplicate. Unusable files keep their bytes in
`data/quarantine/<code>/`, with the reasons in `report.jsonl` there. Equal input gives equal bytes in
`data/prepared`, `data/quarantine` and `reports/prepare`; only the Data Docs hold times.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config.params import Data, Params
from pipeline.data.storage import Bucket
from pipeline.prepare import gates, shards, validation
from pipeline.prepare.blocks import Layout
from pipeline.prepare.buckets import buckets_of, candidate_sizes, in_buckets
from pipeline.prepare.clusters import join_similar
from pipeline.prepare.disk_list import DiskList
from pipeline.prepare.framing import Size
from pipeline.prepare.ingest import (
    IngestedItem,
    OnProgress,
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
    find_families,
    make_records,
    select,
    sort_out,
)
from pipeline.prepare.reports import findings, problems_of, quarantine, report_rows, thumbnails, write_reports
from pipeline.prepare.sources.load import open_source
from pipeline.prepare.sources.source import Item
from pipeline.prepare.splits import SPLITS, assign_splits
from pipeline.prepare.validation import CAPTIONS
from pipeline.processes import seldom_collected
from pipeline.text.load import load_text_encoder

CHECKED = "reports/data_check.jsonl"
Log = Callable[[str], None]


def _ignore_progress(done: int, total: int) -> None:
    return None


def _ignore_line(line: str) -> None:
    return None


@seldom_collected()
def prepare(
    params: Params,
    root: Path,
    work: Path,
    map_tasks: TaskMapper = run_locally,
    processes: int = 1,
    on_progress: OnProgress = _ignore_progress,
    log: Log = _ignore_line,
) -> dict[str, Any]:
    """Run the stage below `root` and return its metrics (those of `reports/prepare/metrics.json`).

    Args:
        work: cache of decoded images and encoded captions, kept between runs.
        map_tasks: runs the decoding, here or on several machines.
        processes: decoding processes of each worker of `map_tasks`.
        on_progress: called with (images done, images in all).
        log: called with each line that a user should see.

    Raises:
        ConfigError, InputMissing: the source cannot be what `params.data` says, or an extra is not installed.
        Busy: the source does not answer, or decoders are killed; another run continues.
        BadData: too many files are unusable, too few are left, or a critical expectation failed. Quarantine and
            reports are written first; `data/prepared` stays as it was.
    """
    data = params.data
    inspection = examine(params, root, work, root / DATA_DOCS, map_tasks, processes, on_progress)
    metrics, ok = inspection.metrics(), inspection.items.ok
    quarantine(root / QUARANTINE, inspection)
    write_reports(root, data, metrics, inspection)
    for line in told(inspection, data):
        log(line)
    gates.require_items(inspection, data, f"{QUARANTINE}/report.jsonl")
    gates.require_valid(inspection.report)
    gates.require_splits(inspection, data, log)
    meta: dict[str, Any] = {}
    with artifacts.commit_directory(root / PREPARED, meta) as folder:
        images, sums = stored_images(ok), stored_sums(ok)
        square = Bucket(data.resolution, data.resolution, len(ok))
        shards.write_images(folder, images, sums, inspection.buckets or (square,), inspection.encoding)
        texts = (image.item.captions for image in ok)
        shards.write_index(folder, inspection.rows(), texts, inspection.captions)
        shards.write_text(folder, inspection.captions, inspection.encoder, work / "captions")
        meta |= {
            "source": data.source,
            "licence": inspection.source.licence,
            "subset": list(data.subset),
            "seed": params.seed,
            "split": data.split.model_dump(),
            "resolution": data.resolution,
            "fit": data.fit,
            "background": list(data.background),
            "text_encoder": inspection.encoder.info,
            "counts": metrics["counts"],
            "validation": inspection.report.as_meta(),
        }
        if inspection.buckets:
            meta["buckets"] = [bucket._asdict() for bucket in inspection.buckets]
    return metrics


def validation_digest(root: Path) -> str:
    """Digest of the validation of `data/prepared`."""
    return str(artifacts.read_manifest(root / PREPARED)["meta"]["validation"]["digest"])


@seldom_collected()
def check(params: Params, root: Path, docs: Path | None, log: Log) -> None:
    """Log in a few lines what `prepare` would do, without doing it. Write what it would leave out to CHECKED, and
    Data Docs to `docs` if given.

    Raises what `prepare` would raise.
    """
    data = params.data
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        inspection = examine(params, root, Path(scratch), docs, run_locally, processes, _ignore_progress)
        metrics, problems = inspection.metrics(), problems_of(inspection)
        if docs is not None:
            counts = metrics["counts"]
            validation.write_index_page(
                docs, inspection.report, data.source, counts, problems, None, thumbnails(inspection)
            )
    counts = metrics["counts"]
    log(f"{data.source}: {counts['n_in']} images, {counts['n_ok']} usable, "
        f"{counts['n_quarantined']} to quarantine, {counts['n_duplicate']} duplicates")  # fmt: skip
    for line in told(inspection, data):
        log(f"  {line}")
    report = root / CHECKED
    report.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_atomic(report, shards.dump_lines(report_rows(inspection)))
    gates.require_items(inspection, data, CHECKED)
    gates.require_valid(inspection.report)
    gates.require_splits(inspection, data, log)
    log(similar_families(metrics))
    parts = splits_in_words(metrics)
    log(f"prepare would write {parts} at {data.resolution} px, {metrics['captions']} captions")


def told(inspection: Inspection, data: Data) -> list[str]:
    """What a user should know before training, a line each: what is left out, `findings`, failed expectations."""
    left_out = sorted(problems_of(inspection).items())
    failed = (*inspection.report.failed("critical"), *inspection.report.failed("warning"))
    of = f", {sample}" if (sample := inspection.report.sample) else ""
    return [
        *(f"{len(lines)} x {code}: {lines[0]}" for code, lines in left_out),
        *findings(inspection, data),
        # Of images without captions `findings` tells.
        *(f"{each.severity}: {each.failure}{of}" for each in failed if each.name != CAPTIONS),
    ]


def examine(
    params: Params,
    root: Path,
    work: Path,
    docs: Path | None,
    map_tasks: TaskMapper,
    processes: int,
    on_progress: OnProgress,
) -> Inspection:
    """Read, decode, sort out, split and validate a source; see `prepare` for arguments and errors."""
    data = params.data
    sizes = candidate_sizes(data.resolution, data.step) if data.fit == "buckets" else ()
    source = open_source(data, root, sizes)
    listing = source.listing()
    items = select(listing.items, data.subset)
    if data.captions == "none":
        items = DiskList(item._replace(captions=()) for item in items)
    encoding = shards.choose_encoding(data.encoding, len(items), data.resolution)
    layout = Layout(data.resolution, params.core.resolution, encoding)

    def take_in(items: Sequence[Item], kept: tuple[Size, ...]) -> Sequence[IngestedItem]:
        own = source if kept == sizes else open_source(data, root, kept)
        cache = work / "pictures" / cache_key(data, layout, kept)[:16]
        return ingest(own, items, layout, cache, map_tasks, processes, on_progress)

    ingested = in_buckets(take_in, items, sizes) if sizes else take_in(items, sizes)
    sorted_items = sort_out(ingested)
    ok = sorted_items.ok
    buckets: tuple[Bucket, ...] = ()
    if sizes:
        found = {image.size for image in ok}
        ok = DiskList(image for size in sizes if size in found for image in ok if image.size == size)
        sorted_items.ok = ok
        buckets = buckets_of(image.size for image in ok)
    clusters = join_similar(find_families(ok), stored_sums(ok), data.resolution, layout.factor)
    families = clusters.names
    splits = assign_splits(families, params.seed, data.split.model_dump())
    captions = shards.unique_captions(image.item.captions for image in ok)
    encoder = load_text_encoder(data.text_encoder, data.max_tokens, captions)
    records = make_records(ok, families, splits, encoder, data.resolution, validation.MAX_ROWS)
    report = validation.validate(records, data.resolution, data.max_tokens, docs, len(ok))
    return Inspection(
        source, listing, sorted_items, clusters, splits, captions, encoder, encoding, report, buckets
    )


def splits_in_words(metrics: dict[str, Any]) -> str:
    """Images and families of each split."""
    counts, families = metrics["counts"], metrics["families"]
    return ", ".join(f"{counts[name]} {name} (families: {families[name]})" for name in SPLITS)


def similar_families(metrics: dict[str, Any]) -> str:
    """How many families were joined because they look alike."""
    found = metrics["clusters"]
    count = found["families"] - found["joined"]
    text = f"{found['families']} families, {count} after those that look alike were joined"
    return text + (
        f"; the largest has {found['largest']} ({found['largest_name']})" if found["joined"] else ""
    )
