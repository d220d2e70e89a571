"""Sheets of pictures as PNG files: caption grids, nearest neighbours. (The page has its own, see pictures.py.)

Nothing is chosen by hand: the grids show the first captions in the random order of the evaluation, and the first
sample of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pipeline.evaluation.memorisation import ALIKE
from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.wording import title_of
from pipeline.models.shape import Images

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

GRID_CAPTIONS = 16
GRID_COLUMNS = 8
TILE = 128  # px; a multiple of usual resolutions, so that pixels stay square
INK, FAINT, RED = (34, 34, 40), (120, 120, 130), (190, 40, 40)


def _font(size: int) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )


def _wrap(text: str, font: FreeTypeFont, width: int, lines: int) -> str:
    """`text` on at most `lines` lines of `width` px, the last one cut with an ellipsis."""
    wrapped: list[str] = []
    words = text[: lines * width].split()  # a character has a pixel at least
    line = ""
    while words and len(wrapped) <= lines:
        word = words.pop(0)
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        elif not line:  # one word, wider than the line
            cut = (
                next((n for n in range(2, len(word) + 1) if font.getlength(word[:n]) > width), len(word) + 1)
                - 1
            )
            wrapped.append(word[:cut])
            words = [word[cut:], *words] if word[cut:] else words
        else:
            wrapped.append(line)
            line = ""
            words.insert(0, word)
    wrapped += [line] if line else []
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(last + "\u2026") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], last + "\u2026"]
    return "\n".join(wrapped)


def _tile(image: Tensor, size: int) -> Image.Image:
    """uint8 [3,H,W] in a square of `size` px: pixels enlarged as squares, or averaged."""
    from PIL import Image

    tile = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    longest = max(tile.size)
    fitted = (round(tile.width * size / longest), round(tile.height * size / longest))
    tile = tile.resize(fitted, Image.Resampling.NEAREST if longest <= size else Image.Resampling.BOX)
    square = Image.new("RGB", (size, size), "white")
    square.paste(tile, ((size - tile.width) // 2, (size - tile.height) // 2))
    return square


def draw_captions(path: Path, captions: Sequence[str], real: Images, shown: Mapping[str, Images]) -> None:
    """Rows: the real images, then each model's; columns: captions, written above. All uint8."""
    from PIL import Image, ImageDraw

    count = min(GRID_CAPTIONS, len(captions))
    blocks = [range(i, min(i + GRID_COLUMNS, count)) for i in range(0, count, GRID_COLUMNS)]
    rows = {"real": real, **shown}
    font, small = _font(14), _font(13)
    gap, label, head = 6, 132, 62
    height = head + len(rows) * (TILE + gap) + 14
    sheet = Image.new("RGB", (label + GRID_COLUMNS * (TILE + gap), height * len(blocks)), "white")
    draw = ImageDraw.Draw(sheet)
    for b, block in enumerate(blocks):
        for column, i in enumerate(block):
            x = label + column * (TILE + gap)
            text = _wrap(captions[i], small, TILE - 4, 3)
            top = b * height + head - 8 - 17 * len(text.split("\n"))
            draw.multiline_text((x + TILE / 2, top), text, INK, small, anchor="ma", align="center", spacing=3)
            for row, images in enumerate(rows.values()):
                y = b * height + head + row * (TILE + gap)
                if i < len(images):
                    sheet.paste(_tile(images[i], TILE), (x, y))
                draw.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=(225, 225, 230))
        for row, name in enumerate(rows):
            y = b * height + head + row * (TILE + gap) + TILE // 2
            text = _wrap(title_of(name).replace(", ", " \u00b7 "), font, label - 20, 2)
            draw.multiline_text((label - 12, y), text, FAINT, font, anchor="rm", align="right")
    sheet.save(path)


def draw_sheet(path: Path, captions: Sequence[str], images: Images) -> None:
    """Images, uint8, in rows of 8, each with its caption below."""
    from PIL import Image, ImageDraw

    gap, text_height, font = 6, 54, _font(13)
    rows = -(-len(captions) // GRID_COLUMNS)
    pitch_x, pitch_y = TILE + gap, TILE + text_height
    sheet = Image.new("RGB", (GRID_COLUMNS * pitch_x + gap, rows * pitch_y + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, image) in enumerate(zip(captions, images, strict=True)):
        x, y = i % GRID_COLUMNS * pitch_x + gap, i // GRID_COLUMNS * pitch_y + gap
        sheet.paste(_tile(image, TILE), (x, y))
        draw.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=(225, 225, 230))
        wrapped = _wrap(caption, font, TILE - 4, 3)
        draw.multiline_text(
            (x + TILE / 2, y + TILE + 4), wrapped, INK, font, anchor="ma", align="center", spacing=2
        )
    sheet.save(path)


def draw_neighbours(
    path: Path,
    samples: Images,
    captions: Sequence[str],
    nearest: Images,
    nearest_captions: Sequence[str],
    rho: Float64,
    pairs: int = 12,
) -> None:
    """Samples beside the training image that is nearest to each: `pairs` of those most like copies (least rho),
    then of the first ones."""
    from PIL import Image, ImageDraw

    suspects = np.argsort(rho, kind="stable")[:pairs].tolist()
    others = [i for i in range(len(samples)) if i not in set(suspects)][:pairs]
    font, size, columns, text_height, head = _font(12), 96, 6, 70, 34
    width = 2 * size + 18
    groups = [("Most like copies", suspects), ("First samples", others)]
    heights = [head + -(-len(chosen) // columns) * (size + text_height) for _, chosen in groups if chosen]
    sheet = Image.new("RGB", (columns * width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for title, chosen in groups:
        if not chosen:
            continue
        draw.text((4, top + 8), f"{title} (sample | nearest training image)", FAINT, _font(14))
        for place, i in enumerate(chosen):
            x, y = place % columns * width + 4, top + head + place // columns * (size + text_height)
            sheet.paste(_tile(samples[i], size), (x, y))
            sheet.paste(_tile(nearest[i], size), (x + size + 2, y))
            draw.rectangle((x - 1, y - 1, x + 2 * size + 2, y + size), outline=(225, 225, 230))
            texts = captions[i], nearest_captions[i]
            for column, text in enumerate(texts):
                wrapped = _wrap(text, font, size - 2, 3)
                draw.multiline_text((x + column * (size + 2), y + size + 3), wrapped, INK, font, spacing=2)
            colour = RED if rho[i] < ALIKE else FAINT
            draw.text((x, y + size + 50), f"d1/d2 = {rho[i]:.2f}", colour, font)
        top += heights[0] if title == groups[0][0] else 0
    sheet.save(path)
