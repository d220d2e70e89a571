"""Encoded captions on disk, so that a caption is encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.text.encoder import Halves, TextEncoder

CACHE_CAPTIONS = 1024  # per file of the cache


def encode_cached(
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Halves:
    """Encode those of `captions` whose vectors `folder` lacks, and add these to it.

    Equal captions give equal bytes, cached or not. A file of the cache, `<digest of encoder.info>/<sha256 of the
    file>.safetensors`, holds at most 1,024 captions and their vectors. A file whose sha256 differs from its name is
    removed, and its captions are encoded again.

    Args:
        on_progress: called with (captions done, captions in all), equal ones counted once.

    Returns:
        As `TextEncoder.encode`, in float16: pooled [n, dim], tokens [n, max_tokens, dim], mask bool.
    """
    result = _empty(len(captions), encoder.info)
    encode_into(result, encoder, captions, folder, on_progress)
    return result


def encode_into(
    result: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """`encode_cached` into arrays of zeros, which may be memory maps."""
    place = folder / artifacts.digest(encoder.info)[:16]
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    todo = dict.fromkeys(rows)

    def keep(texts: Sequence[str], block: Halves) -> None:
        for number, text in enumerate(texts):
            if text in todo:
                del todo[text]
                for array, part in zip(result, block, strict=True):
                    array[rows[text]] = part[number]
        on_progress(len(rows) - len(todo), len(rows))

    for path in sorted(place.glob("*.safetensors")):
        if (block := _read_block(path)) is not None:
            keep(*block)
    new = list(todo)
    for start in range(0, len(new), CACHE_CAPTIONS):
        texts = new[start : start + CACHE_CAPTIONS]
        pooled, tokens, mask = encoder.encode(texts)
        halves = pooled.astype(np.float16), tokens.astype(np.float16), mask
        _write_block(place, texts, halves)
        keep(texts, halves)


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
    """Captions and vectors of one file. A damaged file is removed, and gives None."""
    from safetensors.numpy import load

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        path.unlink(missing_ok=True)
        return None
    arrays = load(content)
    texts: list[str] = json.loads(arrays["captions"].tobytes())
    return texts, (arrays["pooled"], arrays["tokens"], arrays["mask"].astype(np.bool_))
