"""What is measured of every image, for validation: cheap numbers of its framed pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.prepare.framing import DecodedImage

TOGETHER = 2**17  # pixels, about, that are measured in one go: as many as a processor's cache holds
EXACT = 256  # squares of bytes whose sum float32 holds
HASHED, LOW = 32, 8  # px a side of the image that is hashed, and of its frequencies in the hash
# Of the discrete cosine transform (type II): the lowest frequencies, a row each.
COSINES = np.cos(np.pi / HASHED * np.outer(np.arange(LOW), np.arange(HASHED) + 0.5))


class ImageMeasures(NamedTuple):
    """Numbers of one image. Grey levels are 0-255."""

    pixels: str  # sha256 of the framed pixels
    width: int  # px of the file
    height: int
    mode: str  # of the file, by Pillow's names
    mean: float  # grey levels, over all channels
    std: float
    entropy: float  # bits, of the histogram of grey levels: 0 (one level) to 8
    sharpness: float  # variance of the 5-point Laplacian of grey levels
    phash: str  # 64-bit perceptual hash (of the low frequencies), 16 hexadecimal digits
    peak: int  # the largest value, without padding
    several: bool  # whether the file holds more images


def measure(images: Sequence[DecodedImage]) -> list[ImageMeasures]:
    """Measure framed pixels, uint8 [H, W, 3] each; many of one size at once cost less each.

    An image has the same numbers in any batch and on any machine: all sums are exact.
    """
    measured: dict[int, ImageMeasures] = {}
    for shape in {image.pixels.shape for image in images}:
        numbers = [i for i, image in enumerate(images) if image.pixels.shape == shape]
        group = max(TOGETHER // math.prod(shape), 1)
        for start in range(0, len(numbers), group):
            some = numbers[start : start + group]
            measured |= zip(some, _measure_group([images[i] for i in some]), strict=True)
    return [measured[i] for i in range(len(images))]


def _measure_group(images: Sequence[DecodedImage]) -> Iterator[ImageMeasures]:
    planes = np.ascontiguousarray(np.stack([image.pixels.transpose(2, 0, 1) for image in images]))
    grey = _grey(planes)
    histograms, small = _by_pillow(grey)
    numbers = np.stack([*_moments(planes), _entropy(histograms), _sharpness(grey)], 1).tolist()
    for image, own, (mean, std, entropy, sharpness), phash in zip(
        images, planes, numbers, _hashes(small), strict=True
    ):
        yield ImageMeasures(
            pixels=hashlib.sha256(own.data).hexdigest(),
            width=image.width,
            height=image.height,
            mode=image.mode,
            mean=round(mean, 4),
            std=round(std, 4),
            entropy=round(entropy, 4),
            sharpness=round(sharpness, 4),
            phash=phash,
            peak=image.peak,
            several=image.several,
        )


def _grey(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma of ITU-R BT.601: uint8 [n, 3, H, W] to uint8 [n, H, W]."""
    weights = np.array([77, 150, 29], np.uint16)  # Their sum is 256.
    luma = np.einsum("nchw,c->nhw", planes, weights, dtype=np.uint16, casting="unsafe")
    return ((luma + 128) >> 8).astype(np.uint8)


def _by_pillow(grey: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Histograms [n, 256] of grey images, and the images made small, uint8 [n, 32, 32]."""
    from PIL import Image

    images = [Image.fromarray(each) for each in grey]
    small = [image.resize((HASHED, HASHED), Image.Resampling.BOX, reducing_gap=1.0) for image in images]
    return np.array([image.histogram() for image in images]), np.array([np.asarray(each) for each in small])


def _moments(planes: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the values of each image: [n, 3, H, W] to [n] twice."""
    count = planes[0].size
    values = planes.reshape(len(planes), -1, math.gcd(count, EXACT)).astype(np.float32)
    totals = values.sum(2).sum(1, dtype=np.float64)
    squares = np.einsum("ijk,ijk->ij", values, values).sum(1, dtype=np.float64)
    return totals / count, np.sqrt(squares * count - totals**2) / count


def _entropy(histograms: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits, of values of which there are histograms[:, i] each: [n, 256] to [n]."""
    fraction = histograms / histograms.sum(1, keepdims=True)
    return (
        -(fraction * np.log2(fraction, out=np.zeros_like(fraction), where=fraction > 0)).sum(1) + 0.0
    )  # not -0


def _sharpness(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Variance of the sum of the four neighbours less four times the pixel: [n, H, W] to [n]."""
    g = grey.astype(np.int16)
    laplacian = g[:, :-2, 1:-1] + g[:, 2:, 1:-1]
    laplacian += g[:, 1:-1, :-2]
    laplacian += g[:, 1:-1, 2:]
    laplacian -= 4 * g[:, 1:-1, 1:-1]
    values = laplacian.reshape(len(grey), -1).astype(np.float64)
    squares, totals, count = np.einsum("ij,ij->i", values, values), values.sum(1), values.shape[1]
    return (squares * count - totals**2) / count**2


def _hashes(small: NDArray[np.uint8]) -> list[str]:
    """The perceptual hash of pHash: which of the lowest 8 x 8 frequencies lie above their median.

    Grey images, uint8 [n, 32, 32], to 16 hexadecimal digits each. Frequencies are rounded, so that those of blank
    images are 0, and no noise.
    """
    low = np.rint(COSINES @ small @ COSINES.T).reshape(len(small), -1)
    ordered = np.sort(low, axis=1)
    middle = low.shape[1] // 2
    medians = (ordered[:, middle - 1] + ordered[:, middle]) / 2
    return [bits.tobytes().hex() for bits in np.packbits(low > medians[:, None], axis=1)]


def near_duplicates(hashes: Iterable[str], max_bits: int = 3) -> NDArray[np.int64]:
    """Pairs i < j, sorted, of 64-bit hashes (hexadecimal) that differ in at most `max_bits` (0 to 3) bits: [m, 2].

    Two such hashes agree in one of four 16-bit parts, so only those that share a part are compared; parts that
    more than 64 hashes share (blank images, one image many times) are compared in windows of that many.
    """
    assert 0 <= max_bits <= 3
    values = np.fromiter((int(text, 16) for text in hashes), np.uint64)
    pairs = [np.zeros((0, 2), np.int64)]
    for part in range(4):
        keys = (values >> np.uint64(16 * part)) & np.uint64(0xFFFF)
        order = np.lexsort((values, keys))
        sorted_keys, sorted_values = keys[order], values[order]
        for step in range(1, min(64, len(order))):
            near = sorted_keys[step:] == sorted_keys[:-step]
            if not near.any():
                break
            apart = np.bitwise_count(sorted_values[step:] ^ sorted_values[:-step])
            close = np.flatnonzero(near & (apart <= max_bits))
            first, second = order[close], order[close + step]
            pairs.append(np.stack([np.minimum(first, second), np.maximum(first, second)], 1))
    return np.unique(np.concatenate(pairs), axis=0)
