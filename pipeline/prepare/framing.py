"""From a decoded image of any size to one of the wanted resolution: a square, or the nearest of some sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.prepare.limits import USUAL, Limits

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width, height


class Framing(NamedTuple):
    """How an image of any shape becomes one that networks take.

    fit: "crop" takes the largest centred square, "pad" puts the whole image on a square of the background colour,
    "buckets" takes the largest centred part of the shape of the nearest of `sizes`.
    background: red, green, blue (0-255), also put behind transparent pixels.
    limits: of the image's file.
    """

    resolution: int
    fit: str
    background: tuple[int, ...]
    sizes: tuple[Size, ...] = ()
    limits: Limits = USUAL

    def size_for(self, size: Size) -> Size:
        """The size, in px, of what is made of an image of `size`."""
        if self.fit == "buckets":
            return min(self.sizes, key=lambda target: elongation(size, target))
        return self.resolution, self.resolution

    def turned(self) -> Framing:
        """The framing of images that are turned by a right angle afterwards."""
        return self._replace(sizes=tuple(size[::-1] for size in self.sizes))


def elongation(size: Size, target: Size) -> float:
    """How many times as long as wide, or as wide as long, an image becomes if it is stretched to `target`."""
    across, down = size[0] * target[1], size[1] * target[0]
    return max(across, down) / min(across, down)


class DecodedImage(NamedTuple):
    """A framed image, and what its file was like."""

    pixels: Pixels  # [H, W, 3], sRGB
    width: int  # px of the file, upright
    height: int
    mode: str  # Pillow's name of the file's pixel format, such as RGB, P or I;16
    peak: int = 255  # the largest value of the pixels, without padding
    several: bool = False  # whether the file holds more images than this one


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
    across, down = target = framing.size_for(size)
    part_width = min(width, max(1, round(height * across / down)))
    part_height = min(height, max(1, round(width * down / across)))
    left, top = (width - part_width) // 2, (height - part_height) // 2
    return CropBox(left, top, left + part_width, top + part_height, target)


def pad(pixels: Pixels, framing: Framing) -> Pixels:
    """Pixels, where the fit is "pad", in the middle of a square of the background colour: uint8 [R, R, 3]."""
    return centred(pixels, framing.resolution, framing.background) if framing.fit == "pad" else pixels


def centred(pixels: Pixels, side: int, background: tuple[int, ...]) -> Pixels:
    """Pixels in the middle of a square of one colour: uint8 [side, side, 3]."""
    height, width, _ = pixels.shape
    if height == width == side:
        return pixels
    square = np.full((side, side, 3), background, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
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
