"""Images on disk with random access, through memory maps: raw, or PNG with a table of offsets.

    NAME.npy                          uint8 [n, 3, H, W]
    NAME.png.npy, NAME.offsets.npy    uint8 [bytes], int64 [n + 1]: image i lies at offsets[i] ... offsets[i + 1]

Raw is read about forty times as fast; PNG takes 60% of the space for photographs, 3 to 12% for drawings
(docs/data.md). Needs only numpy, and Pillow to write PNG and kornia-rs to read it.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
HEADER = 128  # bytes before the values in a file of any array that is stored here
KINDS = {"F16": np.float16, "U8": np.uint8}  # dtypes of safetensors


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


def create_safetensors(
    path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, NDArray[Any]]:
    """Arrays of zeros to be filled, through a memory map: the file that `safetensors.save_file` would write.

    `shapes` has dtype (of KINDS) and shape of each by name, in the order of the file: large items first, then by
    name. The space is taken before, so that a full disk is an OSError.
    """
    header, end = {}, 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(KINDS[kind]).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
    return open_safetensors(path, "r+")


def open_safetensors(path: Path, mode: Literal["r", "r+"] = "r") -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file with dtypes of KINDS, through a memory map."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        place, shape = start + entry["data_offsets"][0], tuple(entry["shape"])
        arrays[name] = np.asarray(np.memmap(path, KINDS[entry["dtype"]], mode, place, shape))
    return arrays


class JsonLines(Sequence[Any]):
    """The lines of a JSON lines file, parsed when asked for; 8 bytes of memory a line."""

    def __init__(self, path: Path) -> None:
        self._file = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        self._ends = np.flatnonzero(self._file == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        start = int(self._ends[number - 1]) + 1 if number else 0
        return json.loads(self._file[start : self._ends[number]].tobytes())


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
