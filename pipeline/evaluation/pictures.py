"""The pictures of the page, each inside it as a data URI: samples with captions, comparisons, nearest neighbours.

Nothing is chosen by hand: captions come in the random order of the evaluation, with the first sample of each;
nearest neighbours with the most suspicious ones first.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.memorisation import ALIKE
from pipeline.evaluation.samples import Samples
from pipeline.evaluation.wording import title_of
from pipeline.models.shape import Images

MAX_PX = 96  # of a picture; larger ones are averaged over boxes
MAX_PIXELS = 800_000  # of all pictures of the comparisons together: the page is to be mailed
CAPTIONS = 4, 16  # least and most captions of a comparison
HERO_PIXELS = 24 * 64 * 64
SUSPECTS = 6  # for each number of passes


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, what it is of, and what it shows."""

    source: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Grid:
    """Images of the same captions: a row for each caption, a column for each of `titles`."""

    split: str
    titles: list[str]
    rows: list[tuple[str, list[Picture]]]  # caption and pictures


@dataclass(frozen=True)
class Suspect:
    """A sample beside the training image that is nearest to it, and rho (memorisation.Neighbours)."""

    sample: Picture
    nearest: Picture
    rho: float

    @property
    def alike(self) -> bool:
        """Whether it is much nearer to one training family than to all others."""
        return self.rho < ALIKE


def picture(image: Tensor, caption: str, what: str) -> Picture:
    """uint8 [3,H,W], without loss up to MAX_PX a side."""
    from PIL import Image

    shown = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    longest = max(shown.size)
    if longest > MAX_PX:
        size = (round(shown.width * MAX_PX / longest), round(shown.height * MAX_PX / longest))
        shown = shown.resize(size, Image.Resampling.BOX)
    file = io.BytesIO()
    shown.save(file, "WEBP", lossless=True, quality=75, method=4)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return Picture(source, caption, f"{what}: {caption}")


def best_samples(name: str, samples: Samples, caption_set: CaptionSet) -> list[Picture]:
    """The first samples of a contender, one a caption."""
    count = min(max(HERO_PIXELS // _pixels(samples.images), 6), 24, len(caption_set.captions))
    shown = zip(samples.images[:count], caption_set.captions[:count], strict=True)
    return [picture(image, caption, title_of(name)) for image, caption in shown]


def compare_captions(names: Sequence[str], samples: Mapping[str, Samples], caption_set: CaptionSet) -> Grid:
    """The real image of each caption, and a sample of each contender."""
    pixels = 2 * (len(names) + 1) * _pixels(caption_set.images)
    least, most = CAPTIONS
    count = min(max(MAX_PIXELS // pixels, least), most, len(caption_set.captions))
    columns = {"real": caption_set.images, **{name: samples[name].images for name in names}}
    rows = []
    for i, caption in enumerate(caption_set.captions[:count]):
        tiles = [picture(images[i], caption, title_of(name)) for name, images in columns.items()]
        rows.append((caption, tiles))
    return Grid(caption_set.split, [title_of(name) for name in columns], rows)


def _pixels(images: Images) -> int:
    """Of the first picture, at most."""
    return min(max(images[0].shape[1:]), MAX_PX) ** 2


def find_suspects(
    name: str,
    comparison: Comparison,
    samples: Samples,
    caption_set: CaptionSet,
    dataset: PreparedDataset,
) -> list[Suspect]:
    """The samples of least rho, and their nearest training images."""
    found = comparison.sets[caption_set.split][name].neighbours
    suspects = []
    for i in np.argsort(found.rho, kind="stable")[:SUSPECTS].tolist():
        row = int(found.row[i])
        caption = caption_set.captions[int(caption_set.which[i])]
        mine = picture(samples.images[i], caption, title_of(name))
        theirs = picture(dataset.images(found.row[[i]])[0], name_of(dataset, row), "nearest training image")
        suspects.append(Suspect(mine, theirs, float(found.rho[i])))
    return suspects


def name_of(dataset: PreparedDataset, row: int) -> str:
    """The first caption of a row of the data set."""
    number = dataset.caption_of(row)
    return dataset.captions[number] if number >= 0 else "no caption"
