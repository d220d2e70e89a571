"""Preparation from a folder, in a process of its own that is bound to a number of cores."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.data.decode import shrunk
from benchmarks.data.synthetic import CLASSES, FILE_SIZES, FORMATS, encoded, photo
from benchmarks.measure import Rates, Run, absent, interleave, ratio, show, significant, table
from pipeline.config.params import Params, load_params
from pipeline.prepare.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]


class Bound:
    """A fresh process on `cores` cores, which imports and forks on its own."""

    def __init__(self, cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_bind, initargs=(cores,))

    def __enter__(self) -> Bound:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run `work` there."""
        return self._pool.submit(work, *args).result()


def _bind(cores: int) -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def write_files(root: Path, numbers: Iterable[int], px: int) -> None:
    """Files of all formats, in folders that name their class, below `root`/data/raw; to be shrunk to `px`."""
    for number in numbers:
        form = list(FORMATS)[number % len(FORMATS)]
        path = root / "data/raw" / f"class {number % CLASSES}" / f"{number:06d}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(number, *FILE_SIZES[px]), form))


def _folder_params(px: int) -> Params:
    params = load_params(ROOT / "params.yaml")
    changes = {
        "source": "folder",
        "path": "data/raw",
        "subset": (),
        "text_encoder": "label",
        "resolution": px,
    }
    return params.model_copy(update={"data": params.data.model_copy(update=changes)})


def seconds_to_prepare(root: Path, processes: int, px: int) -> tuple[float, int]:
    """Seconds that the stage takes below `root`, and the items that it decodes."""
    missing: list[int] = []  # items that the cache lacked, at each call

    def on_progress(done: int, total: int) -> None:
        missing.append(total - done)

    start = time.perf_counter()
    prepare(_folder_params(px), root, root / "work", processes=processes, on_progress=on_progress)
    return time.perf_counter() - start, missing[0]


def seconds_by_pillow(root: Path, px: int) -> float:
    """Seconds for a loop over the files with Pillow, and one `np.save`. Nothing is validated."""
    start = time.perf_counter()
    files = sorted((root / "data/raw").rglob("*.*"))
    np.save(root / "pillow.npy", np.stack([np.asarray(shrunk(Image.open(file), px)) for file in files]))
    return time.perf_counter() - start


def seconds_by_datasets(root: Path, px: int) -> float:
    """Seconds for `imagefolder` and `map` into a fresh Arrow cache. Nothing is validated."""
    import datasets

    datasets.disable_progress_bars()
    cache = root / "arrow"
    shutil.rmtree(cache, ignore_errors=True)
    start = time.perf_counter()
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(root / "data/raw"), split="train", cache_dir=str(cache)
    )
    found.map(lambda row: {"image": shrunk(row["image"], px)})
    return time.perf_counter() - start


OURS, LOOP, ARROW = "crescendo prepare", "Pillow, np.save", "Hugging Face map"
PREPARE_HEADERS = ("", "cores", "s", "images/s", "fixed s", "images/s beyond", "a core, to Pillow")
Times = dict[tuple[str, Path], Rates]


def prepare_table(count: int, repeats: int, px: int, cores: Sequence[int] = (1, 2)) -> str:
    """Preparation of a folder, whole and after 1% of it is new."""
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch, "few"), Path(scratch, "many")
        write_files(few, range(count // 4), px)
        write_files(many, range(count), px)
        parts = [_prepare_on(number, few, many, count, repeats, px) for number in cores]
    title = (
        f"Prepare {count} files of mixed formats, {{}}x{{}}, at {px} px. Fixed: seconds that do not grow with "
        "the files.\n\n"
    )
    lines = [line for lines, _ in parts for line in lines]
    return (
        title.format(*FILE_SIZES[px])
        + table(PREPARE_HEADERS, lines)
        + "".join(f"\n{note}" for _, note in parts)
    )


def _prepare_on(
    cores: int, few: Path, many: Path, count: int, repeats: int, px: int
) -> tuple[list[list[str]], str]:
    """Lines of the table for one number of cores, and a sentence on what is done again."""
    again: list[tuple[float, int]] = []  # (share of the first time, items decoded)
    peers: dict[str, Callable[[Path, int], float]] = {LOOP: seconds_by_pillow}
    if importlib.util.find_spec("datasets"):
        peers[ARROW] = seconds_by_datasets
    with Bound(cores) as run:
        runs: dict[tuple[str, Path], Run] = {
            (OURS, few): partial(_prepare_afresh, run, few, cores, px),
            (OURS, many): partial(_prepare_and_again, run, many, cores, px, count, again),
        }
        runs |= {
            (name, root): partial(run, work, root, px) for name, work in peers.items() for root in (few, many)
        }
        times = interleave(runs, repeats)
    lines = [
        _prepare_line(name, cores if name == OURS else 1, times, few, many, count) for name in (OURS, *peers)
    ]
    if ARROW not in peers:
        lines.append(absent(ARROW, PREPARE_HEADERS))
    shares, decoded = zip(*again[1:], strict=True)
    share = f"{statistics.median(shares):.0%} of the time before"
    return lines, f"With 1% more files, cores: {cores}; {share}, {decoded[0]} decoded.\n"


def _prepare_afresh(run: Bound, root: Path, cores: int, px: int) -> float:
    for name in ("work", "data/prepared", "data/quarantine", "reports"):
        shutil.rmtree(root / name, ignore_errors=True)
    return float(run(seconds_to_prepare, root, cores, px)[0])


def _prepare_and_again(
    run: Bound, root: Path, cores: int, px: int, count: int, again: list[tuple[float, int]]
) -> float:
    """Seconds to prepare; then `again` hears how it went with 1% more files, which are removed after."""
    first = _prepare_afresh(run, root, cores, px)
    extra = range(count, count + max(count // 100, 1))
    write_files(root, extra, px)
    second, decoded = run(seconds_to_prepare, root, cores, px)
    again.append((second / first, decoded))
    for number in extra:
        next((root / "data/raw").rglob(f"{number:06d}.*")).unlink()
    return first


def _prepare_line(name: str, cores: int, times: Times, few: Path, many: Path, count: int) -> list[str]:
    more = count - count // 4
    rates, base = (
        [more / (b - a) for a, b in zip(times[who, few], times[who, many], strict=True)]
        for who in (name, LOOP)
    )
    total, rate = statistics.median(times[name, many]), statistics.median(rates)
    fixed = max(total - count / rate, 0.0)
    figures = [significant(value) for value in (count / total, fixed, rate)]
    return [name, str(cores), show(times[name, many]), *figures, f"{ratio(rates, base) / cores:.2f}x"]
