"""Storage of images in memory: bytes, and rates of writing and reading."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.data.synthetic import Bytes, flat, photo, squares
from benchmarks.measure import Run, interleave, per_second, significant, table
from pipeline.data import storage

Codec = tuple[Callable[[Bytes], Any], Callable[[Any], Bytes]]


def _stored(encoding: str) -> Codec:
    return partial(storage.encode, encoding=encoding), lambda stored: storage.decode(stored).copy()


def _webp() -> Codec:
    def encode(pixels: Bytes) -> bytes:
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.save(file, "WEBP", lossless=True, method=0, quality=0)
        return file.getvalue()

    return encode, lambda content: np.array(Image.open(io.BytesIO(content))).transpose(2, 0, 1)


def _zstd() -> Codec:
    import pyarrow as pa

    def encode(pixels: Bytes) -> tuple[bytes, tuple[int, ...]]:
        return pa.compress(pixels.tobytes(), "zstd", asbytes=True), pixels.shape

    def decode(stored: tuple[bytes, tuple[int, ...]]) -> Bytes:
        content, shape = stored
        whole = pa.decompress(content, math.prod(shape), "zstd", asbytes=True)
        return np.frombuffer(whole, np.uint8).reshape(shape).copy()

    return encode, decode


CODECS: dict[str, Callable[[], Codec]] = {
    "raw": partial(_stored, "raw"),
    "png": partial(_stored, "png"),
    "WebP lossless": _webp,
    "zstd": _zstd,
}


def store_table(count: int, repeats: int) -> str:
    """Bytes, and rates of writing and reading, of ways to store images."""
    lines = []
    for kind, image in {"photo": photo, "flat": flat}.items():
        for side in (64, 256):
            lines += [[kind, str(side), *line] for line in _store_lines(squares(image, count, side), repeats)]
    headers = ["images", "px", "stored as", "bytes", "share", "written/s", "read/s", "8 GiB hold"]
    return "Pictures in memory, encoded and decoded one at a time.\n\n" + table(headers, lines)


def _store_lines(images: Bytes, repeats: int) -> Iterator[list[str]]:
    codecs = {name: make() for name, make in CODECS.items()}
    stored = {name: [encode(image) for image in images] for name, (encode, _) in codecs.items()}
    runs: dict[tuple[str, str], Run] = {}
    for name, (encode, decode) in codecs.items():
        assert all(np.array_equal(decode(s), p) for s, p in zip(stored[name], images, strict=True))
        runs[name, "write"] = per_second(partial(_apply, encode, images))
        runs[name, "read"] = per_second(partial(_apply, decode, stored[name]))
    rates = interleave(runs, repeats)
    for name in codecs:
        size = statistics.mean(map(_size, stored[name]))
        written, read = (significant(statistics.median(rates[name, verb])) for verb in ("write", "read"))
        share = f"{size / images[0].nbytes:.0%}"
        yield [name, f"{size:,.0f}", share, "" if name == "raw" else written, read, f"{2**33 / size:,.0f}"]


def _apply(work: Callable[[Any], Any], things: Iterable[Any]) -> int:
    return sum(1 for _ in map(work, things))


def _size(stored: Any) -> int:
    if isinstance(stored, tuple):
        return len(stored[0])
    return stored.nbytes if isinstance(stored, np.ndarray) else len(stored)
