"""Images made on the fly: smoothed noise with a gradient and shapes, or flat shapes on white."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Bytes = NDArray[np.uint8]
Picture = Callable[[int, int, int], Image.Image]  # (seed, width, height)

FORMATS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {"quality": 90}}
FILE_SIZES = {64: (320, 256), 256: (640, 512)}  # of the files that are decoded, by the side that they get
CLASSES = 8  # folders of the files that are prepared
BICUBIC = Image.Resampling.BICUBIC


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Noise of all octaves, a gradient, ellipses and grain: as smooth, and as hard to compress, as photographs."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, rng.uniform(-60, 60), width)[None, :, None] + rng.uniform(60, 190, 3)
    for octave in range(2, 8):
        coarse = rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), BICUBIC)
        pixels = pixels + (np.asarray(smooth, np.float64) - 128) * 1.2 / 2 ** (octave - 1)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _ellipses(image, rng, count=3, outline=None)
    grain = rng.normal(0, 2, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def flat(seed: int, width: int, height: int) -> Image.Image:
    """A few flat shapes with black outlines on white, antialiased, as emoji are drawn."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (4 * width, 4 * height), "white")
    _ellipses(image, rng, count=5, outline="black")
    return image.resize((width, height), Image.Resampling.BOX)


def _ellipses(image: Image.Image, rng: np.random.Generator, count: int, outline: str | None) -> None:
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for _ in range(count):
        x, y, a, b = rng.uniform(0.1, 0.7, 4) * (width, height, width / 2, height / 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + a, y + b), fill=colour, outline=outline, width=max(width // 64, 1))


def encoded(image: Image.Image, format: str) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **FORMATS[format])
    return file.getvalue()


def squares(picture: Picture, count: int, side: int) -> Bytes:
    """Square pictures: uint8 [count, 3, side, side]."""
    return np.stack([np.asarray(picture(i, side, side)).transpose(2, 0, 1) for i in range(count)])
