"""What is measured of every picture, for validation: cheap numbers of its framed pixels."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import Picture

HASHED, LOW = 32, 8  # px a side of which the perceptual hash is made, and its frequencies a side
# Of the discrete cosine transform (type II): the lowest frequencies, a row each.
COSINES = np.cos(np.pi / HASHED * np.outer(np.arange(LOW), np.arange(HASHED) + 0.5))


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
    """Measure the framed pixels, uint8 [R, R, 3].

    All is exact in integers but the entropy, so that any machine finds the same.
    """
    from PIL import Image

    planes = np.ascontiguousarray(picture.pixels.transpose(2, 0, 1))
    grey = _grey(planes)
    image = Image.fromarray(grey)
    mean, variance = _moments(planes)
    return Measured(
        pixels=hashlib.sha256(planes.data).hexdigest(),
        width=picture.width,
        height=picture.height,
        mode=picture.mode,
        mean=round(mean, 4),
        std=round(math.sqrt(variance), 4),
        entropy=round(_entropy(np.array(image.histogram())), 4),
        sharpness=round(_moments(_laplacian(grey))[1], 4),
        phash=_phash(np.asarray(image.resize((HASHED, HASHED), Image.Resampling.BOX, reducing_gap=1.0))),
    )


def _grey(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma of ITU-R BT.601: uint8 [3, H, W] to uint8 [H, W]."""
    red, green, blue = planes.astype(np.uint16) * np.array([77, 150, 29], np.uint16)[:, None, None]
    grey: NDArray[np.uint8] = ((red + green + blue + 128) >> 8).astype(np.uint8)
    return grey


def _moments(values: NDArray[np.integer]) -> tuple[float, float]:
    """Mean and variance of all values, from sums that are exact."""
    exact = values.ravel().astype(np.float64)
    total, squares, count = int(exact.sum()), int(exact @ exact), exact.size
    return total / count, (squares * count - total**2) / count**2


def _entropy(histogram: NDArray[np.int64]) -> float:
    """Bits, of values of which there are histogram[i] each."""
    share = histogram[histogram > 0] / histogram.sum()
    return max(float(-(share * np.log2(share)).sum()), 0.0)


def _laplacian(grey: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Sum of the four neighbours less four times the pixel, uint8 [H, W] to int16 [H-2, W-2]."""
    g = grey.astype(np.int16)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1]
    laplacian += g[1:-1, :-2]
    laplacian += g[1:-1, 2:]
    laplacian -= 4 * g[1:-1, 1:-1]
    return laplacian


def _phash(small: NDArray[np.uint8]) -> str:
    """The perceptual hash of pHash: which of the lowest 8 x 8 frequencies of a grey picture, uint8 [32, 32], lie above
    their median; 16 hexadecimal digits. Frequencies are rounded, so that a blank picture has one hash."""
    low = np.rint(COSINES @ small @ COSINES.T).ravel()
    ordered = np.sort(low)
    median = (ordered[len(low) // 2 - 1] + ordered[len(low) // 2]) / 2
    return np.packbits(low > median).tobytes().hex()


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
