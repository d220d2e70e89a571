"""Caches: what `prepare` decoded, encoded and fetched, models taken from elsewhere, and inputs of a cluster's jobs.

All of it is made or fetched again where it is missed. What the current parameters use stays, and so do the most
recently written others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.housekeeping.items import Item, is_own, make_item, plain_folders
from pipeline.housekeeping.needs import Needs
from pipeline.housekeeping.runs import DAY, run_folders
from pipeline.prepare.blocks import Layout
from pipeline.prepare.ingest import cache_key
from pipeline.prepare.sources.places import COPIES
from pipeline.tracking.stage_run import LEASE

ENCODINGS = ("raw", "png")  # of stored images
PREPARED = "data/prepared"


def unneeded_caches(root: Path, runs: Path, storage: Path | None, needs: Needs, keep: int) -> Iterator[Item]:
    """Caches that may be removed: none of `prepare` while it runs, none at all while another user's stage does.

    storage: that of a cluster's jobs, if any."""
    if any(artifacts.is_held(run / LEASE) for run in run_folders(runs) if not is_own(run)):
        return
    leases = [run / LEASE for run in run_folders(runs) if is_own(run)]
    prepare = [lease for lease in leases if lease.parent.parent.name == "prepare"]
    if not any(map(artifacts.is_held, prepare)):
        cache = runs / "prepare/cache"
        if needs.params.data.fit != "buckets":  # whose keys follow from the images
            yield from _others("decoded images", cache / "pictures", _picture_keys(needs), keep, prepare)
        yield from _others("encoded captions", cache / "captions", _caption_keys(root), keep, prepare)
        if "://" not in needs.params.data.path:
            yield from _copies(root / COPIES, prepare)
    if not any(map(artifacts.is_held, leases)):
        pinned = {needs.params.finetune.init_sha256, needs.params.evaluate.baseline_sha256}
        yield from _others("pinned models", runs / "init", pinned, keep, leases)
        if storage is not None:
            yield from _job_inputs(storage / "inputs", runs, leases)


def _others(
    kind: str, folder: Path, used: Iterable[str], keep: int, leases: Iterable[Path]
) -> Iterator[Item]:
    """Folders in `folder` that are not `used`, but for the newest ones."""
    found = [path for path in plain_folders(folder) if path.name not in set(used)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    yield from (
        make_item(kind, path, *leases) for path in found[keep:] if "." not in path.name and is_own(path)
    )


def _picture_keys(needs: Needs) -> set[str]:
    data, low = needs.params.data, needs.params.core.resolution
    return {cache_key(data, Layout(data.resolution, low, encoding), ())[:16] for encoding in ENCODINGS}


def _caption_keys(root: Path) -> set[str]:
    """Of the encoder with which the prepared data were made."""
    try:
        info = artifacts.read_manifest(root / PREPARED)["meta"]["text_encoder"]
    except (StorageError, KeyError):
        return set()
    return {artifacts.digest(info)[:16]}


def _copies(folder: Path, leases: Iterable[Path]) -> Iterator[Item]:
    """Copies of files behind a URL, where the current source is none; `crescendo data check` may use new ones."""
    names = () if folder.is_symlink() or not folder.is_dir() else sorted(folder.iterdir())
    for path in (name for name in names if name.is_file() and not name.suffix):
        if path.stat().st_mtime < time.time() - DAY and is_own(path):
            yield make_item("copies of sources", path, *leases)


def _job_inputs(folder: Path, runs: Path, leases: Iterable[Path]) -> Iterator[Item]:
    """Inputs that no run's view links to; a job may be about to link to new ones."""
    linked = {
        Path(os.path.realpath(link))
        for run in run_folders(runs)
        for link in (run / "inputs").rglob("*")
        if link.is_symlink()
    }
    for path in plain_folders(folder):
        recent = path.stat().st_mtime > time.time() - DAY
        if path not in linked and "." not in path.name and not recent and is_own(path):
            yield make_item("inputs of jobs", path, *leases)
