"""From a decoded image of any size to a square of the wanted resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width, height


class Framing(NamedTuple):
    """How an image of any shape becomes a square.

    fit: "crop" takes the largest centred square, "pad" puts the whole image on the background colour.
    background: red, green, blue (0-255), also put behind transparent pixels.
    """

    resolution: int
    fit: str
    background: tuple[int, ...]


class DecodedImage(NamedTuple):
    """A framed image, and what its file was like."""

    pixels: Pixels  # [R, R, 3], sRGB
    width: int  # px of the file, upright
    height: int
    mode: str  # Pillow's name of the file's pixel format, such as RGB, P or I;16


class CropBox(NamedTuple):
    """The part of an image to keep, and the size to give it."""

    left: int
    top: int
    right: int
    bottom: int
    size: Size


def crop_box(size: Size, framing: Framing) -> CropBox:
    width, height = size
    if framing.fit == "pad":
        scale = framing.resolution / max(size)
        return CropBox(0, 0, width, height, (max(1, round(width * scale)), max(1, round(height * scale))))
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return CropBox(left, top, left + side, top + side, (framing.resolution, framing.resolution))


def pad(pixels: Pixels, framing: Framing) -> Pixels:
    """Pixels in the middle of a square of the background colour: uint8 [R, R, 3]."""
    height, width, _ = pixels.shape
    if height == width:
        return pixels
    square = np.full((framing.resolution, framing.resolution, 3), framing.background, np.uint8)
    top, left = (framing.resolution - height) // 2, (framing.resolution - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def box_mean(pixels: Pixels, factor: int) -> Pixels:
    """Mean of every `factor` x `factor` box: uint8 [H, W, 3] to uint8 [H/factor, W/factor, 3]."""
    height, width, channels = pixels.shape
    boxes = pixels.reshape(height // factor, factor, width // factor, factor, channels)
    means: Pixels = np.rint(boxes.mean((1, 3), dtype=np.float64)).astype(np.uint8)
    return means


def tile(images: Sequence[Pixels], columns: int, gap: int = 2) -> Pixels:
    """Images of one size in rows of `columns`, `gap` px of light grey between them: uint8 [H, W, 3]."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, 224, np.uint8)
    for number, image in enumerate(images):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
