"""Which size of image a service makes where a client asks for one that the model was not trained for."""

from __future__ import annotations

import math
import re

from pipeline.config.sides import side_unit
from pipeline.errors import ConfigError
from pipeline.inference.generator import MAX_STRETCH
from pipeline.models.config import SnapshotConfig

Size = tuple[int, int]  # width, height in px
LEAST_AREA, MOST_AREA = 0.25, 2.0  # of the area of the model's squares, of sizes that are served as asked
ASPECTS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))  # that the page offers


def parse_size(text: str | None) -> Size | None:
    """(width, height) of a text such as 1024x1024; None for none, and for `auto`. Raises ConfigError."""
    if text is None or text == "auto":
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise ConfigError(
            "E-CFG-130", "size", f"{text!r} is no size", "write auto, or WIDTHxHEIGHT such as 128x128"
        )
    return int(found[1]), int(found[2])


def served_size(config: SnapshotConfig, asked: Size | None) -> Size:
    """The size `asked`, if the model can make it and it is about as large as its squares; else the nearest: of the
    same aspect, and of the area of its squares. None is its squares."""
    side = config.resolution
    if asked is None:
        return side, side
    unit = side_unit(config.core.resolution, config.core.net, [shell.net for shell in config.shells])
    width, height = asked
    fits = all(length % unit == 0 and length <= MAX_STRETCH * side for length in asked)
    if fits and LEAST_AREA <= width * height / side**2 <= MOST_AREA:
        return asked
    root = min(max(math.sqrt(width / height), 0.5), 2.0)
    near_width, near_height = (max(round(length / unit), 1) * unit for length in (side * root, side / root))
    return near_width, near_height


def offered_sizes(config: SnapshotConfig) -> list[Size]:
    """Sizes of ASPECTS that the model makes, its squares first."""
    side = config.resolution
    sizes = (served_size(config, (100 * side * width, 100 * side * height)) for width, height in ASPECTS)
    return list(dict.fromkeys(sizes))


def size_text(size: Size) -> str:
    """128x96 of (128, 96)."""
    return f"{size[0]}x{size[1]}"
