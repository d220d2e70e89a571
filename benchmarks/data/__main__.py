"""Data: decoding, preparation, loading and storage, each beside its peers.

    python -m benchmarks.data [--images 512] [--repeats 5] [--only decode|prepare|load|fetch|wait|store]

Images are made on the fly: smoothed noise with a gradient and shapes ("photo"), or flat shapes with outlines on
white ("flat"). One core and one process, unless a line says otherwise. README.md says how to install the peers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator

import torch

from benchmarks.data.decode import decode_table
from benchmarks.data.fetch import fetch_table
from benchmarks.data.load import load_table
from benchmarks.data.prepare import prepare_table
from benchmarks.data.store import store_table
from benchmarks.data.synthetic import FILE_SIZES
from benchmarks.data.wait import wait_table
from benchmarks.measure import machine

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
PACKAGES = (
    "torch",
    "torchvision",
    "pillow",
    "numpy",
    "webdataset",
    "litdata",
    "mosaicml-streaming",
    "datasets",
)


def tables(only: str | None, count: int, repeats: int) -> Iterator[str]:
    """The tables one after the other; `only` is one of TABLES."""
    for name in TABLES if only is None else (only,):
        yield from TABLES[name](count, repeats)


TABLES: dict[str, Callable[[int, int], Iterable[str]]] = {
    "decode": lambda count, repeats: (decode_table(count, repeats, px) for px in FILE_SIZES),
    "prepare": lambda count, repeats: (
        prepare_table(n, repeats, px) for n, px in ((4 * count, 64), (2 * count, 256))
    ),
    "load": lambda count, repeats: (
        load_table(n, repeats, px) for n, px in ((8 * count, 64), (2 * count, 256))
    ),
    "fetch": lambda count, repeats: [fetch_table()],
    "wait": lambda count, repeats: [wait_table(count, repeats)],
    "store": lambda count, repeats: [store_table(max(count // 4, 1), repeats)],
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=TABLES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= OFFLINE
    print(machine(PACKAGES))
    for text in tables(options.only, options.images, options.repeats):
        print(f"\n{text}", end="", flush=True)


if __name__ == "__main__":
    main()
