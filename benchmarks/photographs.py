"""Tiles of several shapes, cut out of the photographs that scikit-learn and scikit-image ship.

They are 18 in all, too few to train on as they are. Each tile is a rectangle of one shape, somewhere in a
photograph, half to all as large as fits; its caption is the photograph's name. Every fourth photograph is held out.
scikit-image is no dependency: `pip install --no-deps scikit-image`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = {  # by package, and the folder in it
    "sklearn/datasets/images": "china.jpg flower.jpg",
    "skimage/data": "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png"
    " grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
}
HELD_OUT = slice(1, None, 4)  # of the photographs, by name


def photographs() -> list[Path]:
    """Their files, by name. Ends the program where a package is not installed."""
    found = []
    for place, names in NAMES.items():
        package, folder = place.split("/", 1)
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("scikit-image is not installed. Fix: pip install --no-deps scikit-image")
        found += [Path(spec.submodule_search_locations[0]) / folder / name for name in names.split()]
    return sorted(found, key=lambda file: file.name)


def tile(photograph: Image.Image, size: tuple[int, int], draw: np.random.Generator) -> Image.Image:
    """A part of a photograph, of the shape and resampled to the `size`, (width, height), somewhere in it."""
    most = min(side / wanted for side, wanted in zip(photograph.size, size, strict=True))
    scale = most * draw.uniform(0.5, 1)
    width, height = (scale * side for side in size)
    left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
    return photograph.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def tiles(
    files: Sequence[Path], sizes: Sequence[tuple[int, int]], copies: int, seed: int = 0
) -> list[tuple[Image.Image, str]]:
    """`copies` tiles of each size of all photographs together, and the names of these."""
    draw, opened = np.random.default_rng(seed), [Image.open(file).convert("RGB") for file in files]
    return [
        (tile(opened[number % len(files)], size, draw), files[number % len(files)].stem.replace("_", " "))
        for number in range(copies)
        for size in sizes
    ]
