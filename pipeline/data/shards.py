"""Writing a prepared data set: image shards, index, captions and their vectors.

    images-00000.npy ...  uint8 [n <= 4096, 3, R, R], C order
    index.jsonl           one row an image, in global order: id, split, base, group, subgroup, captions
    captions.jsonl        one JSON string a line; its line number is its id
    text.safetensors      pooled float16 [n, dim], tokens float16 [n, T, dim], mask uint8 [n, T]

JSON is ASCII, so that a line is a line in any reader. `pipeline.data.dataset` reads all this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.captions import TextEncoder
from pipeline.data.images import Pixels

SHARD_IMAGES = 4096
ENCODE_CAPTIONS = 256  # At a time.


def dump_lines(rows: Iterable[Any]) -> str:
    """JSON lines: ASCII, sorted keys."""
    return "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)


class ShardWriter:
    """Collects pictures and writes a shard whenever one is full; holds one shard in memory."""

    def __init__(self, folder: Path, size: int = SHARD_IMAGES) -> None:
        self._folder = folder
        self._size = size
        self._pending: list[Pixels] = []
        self._shards = 0

    def add(self, pixels: Pixels) -> None:
        """Append one picture, uint8 [R, R, 3]."""
        self._pending.append(pixels.transpose(2, 0, 1))
        if len(self._pending) == self._size:
            self.flush()

    def flush(self) -> None:
        """Write what is collected; call it after the last picture."""
        if self._pending:
            path = self._folder / f"images-{self._shards:05d}.npy"
            np.save(path, np.ascontiguousarray(np.stack(self._pending)), allow_pickle=False)
            self._shards += 1
            self._pending = []

    def read(self, number: int) -> Pixels:
        """Picture `number`, uint8 [R, R, 3], from the shards written so far."""
        path = self._folder / f"images-{number // self._size:05d}.npy"
        picture: Pixels = np.load(path, mmap_mode="r")[number % self._size]
        return np.ascontiguousarray(picture.transpose(1, 2, 0))


def write_index(
    folder: Path, rows: Sequence[dict[str, Any]], captions: Sequence[tuple[str, ...]]
) -> list[str]:
    """Write index.jsonl and captions.jsonl; `captions` are those of each row. Returns all captions by id.

    Where nothing has a caption, one empty caption keeps the arrays of vectors from being empty.
    """
    unique = list(dict.fromkeys(text for texts in captions for text in texts)) or [""]
    ids = {text: number for number, text in enumerate(unique)}
    numbered = [
        {**row, "captions": [ids[t] for t in texts]} for row, texts in zip(rows, captions, strict=True)
    ]
    (folder / "index.jsonl").write_text(dump_lines(numbered), "ascii")
    (folder / "captions.jsonl").write_text(dump_lines(unique), "ascii")
    return unique


def write_text(
    folder: Path, captions: Sequence[str], encoder: TextEncoder, progress: Callable[[int], None]
) -> None:
    """Encode all captions and write text.safetensors; `progress` hears how many are done."""
    from safetensors.numpy import save_file

    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    for start in range(0, len(captions), ENCODE_CAPTIONS):
        pooled, tokens, mask = encoder.encode(captions[start : start + ENCODE_CAPTIONS])
        halves = {"pooled": pooled.astype(np.float16), "tokens": tokens.astype(np.float16)}
        parts.append({**halves, "mask": mask.astype(np.uint8)})
        progress(min(start + ENCODE_CAPTIONS, len(captions)))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    save_file(arrays, folder / "text.safetensors")
