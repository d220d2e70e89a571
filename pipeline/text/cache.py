"""Encoded captions on disk, so that a caption is encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifacts
from pipeline.text.encoder import Halves, TextEncoder

CACHE_CAPTIONS = 1024  # In a file of the cache.


def encode_cached(
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Halves:
    """Encode `captions`, but for those whose vectors `folder` holds; new ones are added to it.

    Equal captions give equal bytes, whatever came from the cache. A file of it, `<digest of encoder.info>/
    <sha256 of the file>.safetensors`, holds at most 1,024 captions and their vectors. One that does not have
    the sha256 of its name is removed, and its captions are encoded again.
    `progress` hears how many different captions are done.

    Returns:
        As `TextEncoder.encode`, in float16: pooled [n, dim], tokens [n, max_tokens, dim], mask bool.
    """
    place = folder / artifacts.digest(encoder.info)[:16]
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    result = _empty(len(captions), encoder.info)
    todo = dict.fromkeys(rows)

    def keep(texts: Sequence[str], block: Halves) -> None:
        for number, text in enumerate(texts):
            if text in todo:
                del todo[text]
                for array, part in zip(result, block, strict=True):
                    array[rows[text]] = part[number]
        progress(len(rows) - len(todo))

    for path in sorted(place.glob("*.safetensors")):
        if (found := _read_block(path)) is not None:
            keep(*found)
    new = list(todo)
    for start in range(0, len(new), CACHE_CAPTIONS):
        texts = new[start : start + CACHE_CAPTIONS]
        pooled, tokens, mask = encoder.encode(texts)
        block = pooled.astype(np.float16), tokens.astype(np.float16), mask
        _write_block(place, texts, block)
        keep(texts, block)
    return result


def _empty(count: int, info: Mapping[str, Any]) -> Halves:
    dim, length = int(info["dim"]), int(info["max_tokens"])
    pooled, tokens = np.zeros((count, dim), np.float16), np.zeros((count, length, dim), np.float16)
    return pooled, tokens, np.zeros((count, length), np.bool_)


def _write_block(place: Path, texts: Sequence[str], block: Halves) -> None:
    from safetensors.numpy import save

    pooled, tokens, mask = block
    listed = np.frombuffer(json.dumps(list(texts)).encode("ascii"), np.uint8)
    content = save({"captions": listed, "pooled": pooled, "tokens": tokens, "mask": mask.astype(np.uint8)})
    artifacts.write_atomic(place / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)


def _read_block(path: Path) -> tuple[list[str], Halves] | None:
    """Captions and vectors of one file; None, and no file, where it is not as it was written."""
    from safetensors.numpy import load

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        path.unlink(missing_ok=True)
        return None
    arrays = load(content)
    texts: list[str] = json.loads(arrays["captions"].tobytes())
    return texts, (arrays["pooled"], arrays["tokens"], arrays["mask"].astype(np.bool_))
