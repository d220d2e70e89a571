"""Images on disk with random access, through memory maps: raw, or PNG with a table of offsets.

    NAME.npy                          uint8 [n, 3, H, W]
    NAME.png.npy, NAME.offsets.npy    uint8 [bytes], int64 [n + 1]: image i lies at offsets[i] ... offsets[i + 1]

Raw is read about forty times as fast; PNG takes 60% of the space for photographs, 3 to 12% for drawings
(docs/data.md). Needs only numpy, and Pillow to write PNG and kornia-rs to read it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
HEADER = 128  # bytes before the values in a file of any array that is stored here


class Bucket(NamedTuple):
    """Consecutive images of one size, in px."""

    height: int
    width: int
    num_images: int


def encode(pixels: Bytes, encoding: str) -> Bytes:
    """The stored form of uint8 [3, H, W]: unchanged (`raw`), or the bytes of a PNG file (`png`)."""
    if encoding == "raw":
        return pixels
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), np.uint8)


def decode(stored: Bytes) -> Bytes:
    """The inverse of `encode`: uint8 [3, H, W]."""
    if stored.ndim == 3:
        return stored
    from kornia_rs.io import decode_image_png_u8

    content = stored.tobytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    pixels: Bytes = decode_image_png_u8(content, (height, width), "rgb")
    return pixels.transpose(2, 0, 1)


def write(folder: Path, name: str, images: Iterable[Bytes], count: int, encoding: str) -> None:
    """Write `count` images that `encode` returned. Holds one raw image in memory, or all PNG images."""
    if encoding == "raw":
        write_array(folder / f"{name}.npy", images, count)
        return
    files = list(images)
    assert len(files) == count
    sizes = np.array([0, *map(len, files)], dtype=np.int64)
    np.save(folder / f"{name}.offsets.npy", np.cumsum(sizes))
    np.save(folder / f"{name}.png.npy", np.concatenate(files) if files else np.zeros(0, np.uint8))


def write_array(path: Path, rows: Iterable[NDArray[np.generic]], count: int) -> None:
    """Write `count` arrays of one shape as one file, a row at a time; not through a memory map, where a full disk
    is a signal (SIGBUS) instead of an OSError."""
    rows = iter(rows)
    first = next(rows, np.zeros((), np.uint8))
    shape = (count, *first.shape)
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        if count:
            file.write(np.ascontiguousarray(first).data)
        number = 1
        for number, row in enumerate(rows, start=2):  # noqa: B007 - the last one is checked
            file.write(np.ascontiguousarray(row).data)
        assert number == max(count, 1)


def open_array(path: Path) -> NDArray[Any]:
    """An array of `write_array`, through a read-only memory map; as a plain ndarray, which is faster to index."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def shard_counts(files: Mapping[str, Mapping[str, Any]], buckets: Sequence[Bucket]) -> dict[str, int]:
    """{NAME: number of images} of the shards of a manifest's `files`, in order, from their sizes in bytes."""
    ends = np.cumsum([bucket.num_images for bucket in buckets])
    counts: dict[str, int] = {}
    before = 0
    for name in sorted({name.split(".")[0] for name in files if name.startswith("images-")}):
        if f"{name}.npy" in files:
            bucket = buckets[min(int(np.searchsorted(ends, before, side="right")), len(buckets) - 1)]
            one = 3 * bucket.height * bucket.width
            counts[name] = max(int(files[f"{name}.npy"]["size"]) - HEADER, 0) // one
        else:
            counts[name] = (int(files[f"{name}.offsets.npy"]["size"]) - HEADER) // 8 - 1
        before += counts[name]
    return counts


class Pictures:
    """Reads what `write` wrote."""

    def __init__(self, folder: Path, name: str) -> None:
        raw = folder / f"{name}.npy"
        self._offsets: NDArray[np.int64] | None = None
        if raw.exists():
            self._data: Bytes = open_array(raw)
        else:
            self._data = open_array(folder / f"{name}.png.npy")
            self._offsets = np.load(folder / f"{name}.offsets.npy", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._data) if self._offsets is None else len(self._offsets) - 1

    def stored(self, row: int) -> Bytes:
        """Image `row` in its stored form."""
        if self._offsets is None:
            return self._data[row]
        return self._data[self._offsets[row] : self._offsets[row + 1]]

    def row(self, row: int) -> Bytes:
        """Image `row`: uint8 [3, H, W]."""
        return decode(self.stored(row))
