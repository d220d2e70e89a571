"""Prepared images behind a URL: fetches in an epoch, and how often training waits for one.

The store is this process's memory. A fetch takes FETCH seconds and a batch is trained on for TRAINING seconds: a
thirtieth of what 64 MiB take at 200 MB/s, and 64 images of 256 px at 300 a second.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.data.load import BATCH, write_prepared
from benchmarks.measure import significant, table
from pipeline.data import ahead
from pipeline.data.cache import Cache
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.folders import FarFolder, push
from pipeline.data.storage import HEADER
from pipeline.prepare import shards

FILES, PER_FILE, SIDE = 64, 341, 8
FETCH, TRAINING = 0.010, 0.007
CASES = (
    (1.0, 0),
    (0.5, 0),
    (0.5, 4),
    (0.5, 16),
    (0.25, 0),
    (0.25, 8),
    (0.25, 16),
)  # cache, files shuffled; 0: all
SOME = 8  # batches that stand for an epoch where all images are shuffled together


class Counter:
    """Counts what a folder fetches, and what of this the main thread waits for."""

    def __init__(self, folder: FarFolder) -> None:
        self._fetch, self._lock, self._main = folder._fetch, threading.Lock(), threading.current_thread()
        self.fetched = self.waited = 0

    def fetch(self, name: str, path: Path) -> None:
        """In place of the folder's own."""
        with self._lock:
            self.fetched += 1
            self.waited += threading.current_thread() is self._main
        time.sleep(FETCH)
        self._fetch(name, path)


def _count(url: str, size: int, share: float, files: int, looks: int) -> tuple[int, int]:
    """Fetches in the second epoch, and those waited for, with a cache for `share` of the files of `size` bytes,
    which are shuffled `files` (0: all) at a time; `looks` coming batches are looked at for each."""
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(ahead, "LOOKS", looks):
        cache = Cache(Path(scratch), 2**30)
        folder = FarFolder(url, cache)
        dataset = PreparedDataset(folder)
        batches = Batches(dataset, "train", 0, BATCH, 1, shuffle_images=files * PER_FILE)
        cache.max_bytes = int(share * FILES * size)  # Now, as `Batches` refuses what we want to see.
        epoch = FILES * PER_FILE // BATCH
        counted = epoch if files else SOME
        for number in range(2 * counted):
            if number == counted:
                counter = Counter(folder)
                folder._fetch = counter.fetch
            batches.at(number * BATCH, 0)
            time.sleep(TRAINING)
        return counter.fetched * epoch // counted, counter.waited * epoch // counted


def fetch_table() -> str:
    """Fetches in an epoch by size of cache and by files that are shuffled together."""
    images = np.random.default_rng(0).integers(0, 256, (FILES * PER_FILE, 3, SIDE, SIDE), dtype=np.uint8)
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(shards, "SHARD_BYTES", PER_FILE * 3 * SIDE**2),
    ):
        write_prepared(Path(scratch, "prepared"), images, "raw", dim=1)
        url = push(Path(scratch, "prepared"), "memory://benchmark", lambda line: None)
    size = PER_FILE * 3 * SIDE**2 + HEADER
    lines = []
    for share, files in CASES:
        fetched, waited = _count(url, size, share, files, ahead.LOOKS)
        without = _count(url, size, share, files, 0)[1]
        counts = [f"{fetched:,}", significant(fetched / FILES), f"{waited:,}", f"{without:,}"]
        lines.append([f"{share:.0%}", str(files) if files else "all", *counts])
    headers = [
        "cache",
        "files shuffled together",
        "fetches",
        "times the set",
        "waited for",
        "without fetching ahead",
    ]
    title = f"Fetches in the second epoch of {FILES} files of {PER_FILE} images, in batches of {BATCH}."
    return f"{title}\n\n" + table(headers, lines)
