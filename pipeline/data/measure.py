"""What is measured of every picture, for validation: cheap numbers of its framed pixels."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import Picture

HASHED = 64  # px a side, about, of which the perceptual hash is made


class Measured(NamedTuple):
    """Numbers of one picture. Grey levels are 0-255."""

    pixels: str  # sha256 of the framed pixels
    width: int  # px of the file
    height: int
    mode: str  # of the file, by Pillow's names
    mean: float  # grey levels, over all channels
    std: float
    entropy: float  # bits, of the histogram of grey levels: 0 (one level) to 8
    sharpness: float  # variance of the 5-point Laplacian of grey levels
    phash: str  # 64-bit perceptual hash (of the low frequencies), 16 hexadecimal digits


def measure(picture: Picture) -> Measured:
    """Measure the framed pixels, uint8 [R, R, 3]."""
    import imagehash
    from PIL import Image

    pixels = np.ascontiguousarray(picture.pixels)
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    mean, std = _moments(np.array(image.histogram()).reshape(3, 256).sum(0))
    share = np.array(grey.histogram()) / (grey.width * grey.height)
    share = share[share > 0]
    return Measured(
        pixels=hashlib.sha256(pixels.data).hexdigest(),
        width=picture.width,
        height=picture.height,
        mode=picture.mode,
        mean=round(mean, 4),
        std=round(std, 4),
        entropy=round(max(float(-(share * np.log2(share)).sum()), 0.0), 4),
        sharpness=round(_laplacian_variance(np.asarray(grey)), 4),
        phash=str(imagehash.phash(grey.reduce(max(grey.width // HASHED, 1)))),
    )


def _moments(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation of the values 0-255, of which there are histogram[i] each."""
    values, count = np.arange(256), int(histogram.sum())
    total, squares = int(histogram @ values), int(histogram @ values**2)
    return total / count, math.sqrt(max(squares * count - total**2, 0)) / count


def _laplacian_variance(grey: NDArray[np.uint8]) -> float:
    g = grey.astype(np.int16)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(laplacian.astype(np.float32).var())


def near_duplicates(hashes: list[str], most: int = 3) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of 64-bit hashes (hexadecimal) that differ in at most `most` (0 to 3) bits.

    Two such hashes agree in one of four 16-bit parts, so only those that share a part are compared; parts that
    more than 64 hashes share (blank pictures, one motif many times) are compared in windows of that many.
    """
    assert 0 <= most <= 3
    values = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    pairs: set[tuple[int, int]] = set()
    for part in range(4):
        keys = (values >> np.uint64(16 * part)) & np.uint64(0xFFFF)
        order = np.lexsort((values, keys))
        sorted_keys, sorted_values = keys[order], values[order]
        for step in range(1, min(64, len(order))):
            near = sorted_keys[step:] == sorted_keys[:-step]
            if not near.any():
                break
            apart = np.bitwise_count(sorted_values[step:] ^ sorted_values[:-step])
            found = np.flatnonzero(near & (apart <= most))
            first, second = order[found], order[found + step]
            pairs.update(
                zip(np.minimum(first, second).tolist(), np.maximum(first, second).tolist(), strict=True)
            )
    return sorted(pairs)
