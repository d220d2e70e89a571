"""Writing a prepared data set: image shards, index, captions and their vectors.

    images-00000...       uint8 [n, 3, H, W], at most 64 MiB a shard; raw or PNG (`pipeline.data.storage`). H and W
                          are R or, where `data.fit` is buckets, those of the shard's bucket
    low-00000.npy ...     uint16 [n, 3, h, w]: sums over the f x f boxes of an image, f = R / r; exact. r is the
                          resolution of the core, which trains without reading the images at full size
    index.jsonl           one row an image, in global order: id, split, base, group, subgroup, captions
    captions.jsonl        one JSON string a line; its line number is its id
    text.safetensors      pooled float16 [n, dim], tokens float16 [n, T, dim], mask uint8 [n, T]

JSON is ASCII, so that a line is a line in any reader. `pipeline.data.dataset` reads all this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.storage import Bucket
from pipeline.text.cache import encode_into
from pipeline.text.encoder import TextEncoder

SHARD_BYTES = 64 * 2**20  # of raw pixels
RAW_BYTES = 8 * 2**30  # a set that is larger than this is stored as PNG, where `data.encoding` is auto
MAX_FACTOR = 16  # of the box sums: 16 * 16 * 255 fits into uint16


def dump_lines(rows: Iterable[Any]) -> str:
    """JSON lines: ASCII, sorted keys."""
    return "".join(map(_dump_line, rows))


def _dump_line(row: Any) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False) + "\n"


def choose_encoding(wanted: str, count: int, resolution: int) -> str:
    """`raw` or `png`: what is wanted, or, for `auto`, raw while the set is small."""
    if wanted != "auto":
        return wanted
    return "raw" if count * 3 * resolution**2 <= RAW_BYTES else "png"


def box_side(resolution: int, low_resolution: int) -> int:
    """px a side of the boxes of `box_sums`, of images of `resolution`."""
    return min(resolution // low_resolution, MAX_FACTOR)


def box_sums(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint16]:
    """Sums over boxes of `factor` x `factor` px: uint8 [3, H, W] to uint16 [3, H / factor, W / factor]."""
    _, height, width = pixels.shape
    lines = pixels.reshape(3, height // factor, factor, width)
    rows = lines[:, :, 0].astype(np.uint16)
    for i in range(
        1, factor
    ):  # whole lines, then every factor-th column: far faster than sums along short axes
        rows += lines[:, :, i]
    sums: NDArray[np.uint16] = rows[:, :, ::factor].copy()
    for i in range(1, factor):
        sums += rows[:, :, i::factor]
    return sums


def write_images(
    folder: Path,
    images: Iterable[NDArray[np.uint8]],
    sums: Iterable[NDArray[np.uint16]],
    buckets: Sequence[Bucket],
    encoding: str,
) -> None:
    """Write images of `buckets`, as stored, and their box sums, in shards of one size each."""
    images, sums = iter(images), iter(sums)
    counts: list[int] = []
    for height, width, count in buckets:
        size = max(SHARD_BYTES // (3 * height * width), 1)
        counts += [min(size, count - start) for start in range(0, count, size)]
    for number, n in enumerate(counts):
        storage.write(folder, f"images-{number:05d}", islice(images, n), n, encoding)
        storage.write_array(folder / f"low-{number:05d}.npy", islice(sums, n), n)


def write_index(
    folder: Path, rows: Iterable[dict[str, Any]], captions: Iterable[tuple[str, ...]], unique: Sequence[str]
) -> None:
    """Write index.jsonl and captions.jsonl; `captions` are those of each row, `unique` all by id."""
    ids = {text: number for number, text in enumerate(unique)}
    numbered = (
        {**row, "captions": [ids[t] for t in texts]} for row, texts in zip(rows, captions, strict=True)
    )
    for name, lines in {"index.jsonl": numbered, "captions.jsonl": unique}.items():
        with open(folder / name, "w", encoding="ascii") as file:
            file.writelines(map(_dump_line, lines))


def unique_captions(captions: Iterable[tuple[str, ...]]) -> list[str]:
    """All captions once, in order. Where nothing has a caption, one empty caption keeps the arrays of vectors from
    being empty."""
    return list(dict.fromkeys(text for texts in captions for text in texts)) or [""]


def write_text(folder: Path, captions: Sequence[str], encoder: TextEncoder, cache: Path) -> None:
    """Encode all captions (those that `cache` lacks) and write text.safetensors."""
    count, length, dim = len(captions), int(encoder.info["max_tokens"]), int(encoder.info["dim"])
    shapes = {
        "pooled": ("F16", (count, dim)),
        "tokens": ("F16", (count, length, dim)),
        "mask": ("U8", (count, length)),
    }
    arrays = storage.create_safetensors(folder / "text.safetensors", shapes)
    encode_into((arrays["pooled"], arrays["tokens"], arrays["mask"]), encoder, captions, cache)
