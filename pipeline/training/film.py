"""The film strip of a training stage: samples of the same captions and seeds, as training goes on.

It is put together from the sample grids that the stage has drawn, so it costs no sampling, and a run that was
killed and continued ends with the same picture.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import artifacts
from pipeline.data.dataset import PreparedDataset
from pipeline.training.reports import COLUMNS, GRID, PADDING, SAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling
    from PIL.ImageFont import FreeTypeFont

CELL = 128  # px of an image
GAP = 4  # px between images
MARGIN = 160  # px on the left, for captions
TITLE = 40  # px above, for the stage and the number of training images
SHOWN = 10  # sample grids, at most: the first, the last, and evenly spread ones

Frame = tuple[str, Path]  # what is written above a column, and the grid whose samples it shows


def frames(stage: str, run: Path, finished: Path | None = None) -> list[Frame]:
    """The sample grids in the run folder of a stage, in order, at most SHOWN; then that of the finished model."""
    drawn = sorted((run / SAMPLES).glob("nimg-????????????.png"))
    chosen = [drawn[i] for i in spread(len(drawn), SHOWN)]
    last = [] if finished is None else [("finished", finished)]
    counted = [(f"{int(path.stem[-12:]):,} images", path) for path in chosen]
    return [(f"{stage}\n{title}", path) for title, path in [*counted, *last]]


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` positions, evenly spread, with the first and the last."""
    chosen: list[int] = np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()
    return chosen


def sampled_captions(dataset: PreparedDataset) -> tuple[list[str], list[str]]:
    """Captions of the images of a sample grid, in order: of training images, and held out."""
    return dataset.names(dataset.pick("train", GRID)), dataset.names(dataset.pick("val", GRID))


def save_film(path: Path, columns: Sequence[Frame], trained: Sequence[str], held_out: Sequence[str]) -> None:
    """Write the film strip as a PNG: a column for each frame, a row for every second image of its grid.

    trained, held_out: captions of the images of every grid, in order."""
    from PIL import Image, ImageDraw

    captions = [*trained, *held_out]
    rows = [*range(0, len(trained), 2), *range(len(trained), len(captions), 2)]
    step = CELL + GAP
    film = Image.new("RGB", (MARGIN + step * len(columns), TITLE + step * len(rows)), "white")
    draw, font = ImageDraw.Draw(film), _font(12)
    for y, row in enumerate(rows):
        lines = textwrap.wrap(captions[row], 22, max_lines=5, placeholder="\u2026")
        words = "\n".join([*lines, "(held out)"] if row >= len(trained) else lines)
        draw.multiline_text((GAP, TITLE + y * step + CELL // 2), words, fill="black", font=font, anchor="lm")
    for x, (title, grid) in enumerate(columns):
        left = MARGIN + x * step
        middle = (left + CELL // 2, TITLE // 2)
        draw.multiline_text(middle, title, fill="black", font=font, anchor="mm", align="center")
        images = list(images_of(grid, len(captions)))
        for y, row in enumerate(rows):
            film.paste(images[row].resize((CELL, CELL), _filter(images[row])), (left, TITLE + y * step))
    content = io.BytesIO()
    film.save(content, "PNG")
    artifacts.write_atomic(path, content.getvalue())


def images_of(grid: Path, count: int) -> Iterator[Image]:
    """The `count` images that `save_grid` has put into a picture, in squares of its white."""
    from PIL import Image, ImageOps

    with Image.open(grid) as opened:
        picture = opened.convert("RGB")
    across = min(COLUMNS, count)
    down = -(-count // across)
    border = PADDING if count > 1 else 0  # make_grid puts none around a single image
    width, height = (picture.width - border) // across, (picture.height - border) // down
    for i in range(count):
        left, top = border + i % across * width, border + i // across * height
        image = picture.crop((left, top, left + width - border, top + height - border))
        yield ImageOps.pad(image, (max(image.size),) * 2, color="white")


def _filter(image: Image) -> Resampling:
    """How an image comes to CELL px: enlarged with its pixels to be seen, or reduced to their means."""
    from PIL.Image import Resampling

    return Resampling.NEAREST if image.width < CELL else Resampling.BOX


def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which has more letters than Pillow's own font."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
