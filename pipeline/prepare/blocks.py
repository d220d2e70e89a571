"""One block of items: read, decoded, measured, and committed to a folder of the cache.

    images-WxH..., low-WxH.npy    images of a size as they are stored, and their box sums
    items.jsonl                   one row an item: id, version, and either size, row and measured, or problem and
                                  settled

A problem is settled if a decoder found it in the item's bytes. No other is: the bytes could not be read, the
decoder was lost, which the machine may have caused, or a plug-in is not installed. Such items are tried again, the
lost ones already in this run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.data import storage
from pipeline.errors import BadData, Busy
from pipeline.prepare.decoder import KILLED, LOSSES, Decoder, Task
from pipeline.prepare.framing import DecodedImage, Pixels, Size
from pipeline.prepare.limits import TOO_MANY_BYTES
from pipeline.prepare.measure import ImageMeasures, measure
from pipeline.prepare.photos import NO_PLUGIN
from pipeline.prepare.shards import box_side, box_sums
from pipeline.prepare.sources.patience import FEW, Patience
from pipeline.prepare.sources.source import Item, Source

Work = Callable[[list[Item]], int]
Key = tuple[str, str]


class Layout(NamedTuple):
    """How images are stored: see `pipeline.prepare.shards`."""

    resolution: int
    low_resolution: int
    encoding: str

    @property
    def factor(self) -> int:
        """px a side of the boxes whose sums are stored."""
        return box_side(self.resolution, self.low_resolution)


def key_of(item: Item) -> Key:
    """What a block knows an item by."""
    return item.id, item.version


def is_settled(row: dict[str, Any]) -> bool:
    """Whether a row of items.jsonl holds for every later run."""
    return bool(row.get("settled", True))


@contextmanager
def block_maker(source: Source, layout: Layout, cache: Path, processes: int) -> Iterator[Work]:
    """`make_block` with decoding processes of its own."""
    finish = partial(encode_images, layout)
    with Decoder(source.decode, processes, source.limits, finish=finish) as decoder:
        yield partial(make_block, source, layout, cache, decoder)


class EncodedImage(NamedTuple):
    """What a decoder returns for an image."""

    stored: Pixels  # see `storage.encode`
    sums: NDArray[np.uint16]  # see `shards.box_sums`
    measured: ImageMeasures
    size: Size


def name_of(kind: str, size: Size) -> str:
    """The name, in a block, of what is stored of images of a size."""
    return f"{kind}-{size[0]}x{size[1]}"


def encode_images(layout: Layout, images: list[DecodedImage]) -> list[EncodedImage]:
    """Measure decoded images and encode them as they are stored."""
    measured = measure(images)
    planes = [np.ascontiguousarray(image.pixels.transpose(2, 0, 1)) for image in images]
    return [
        EncodedImage(
            storage.encode(pixels, layout.encoding),
            box_sums(pixels, layout.factor),
            numbers,
            pixels.shape[:0:-1],
        )
        for pixels, numbers in zip(planes, measured, strict=True)
    ]


def make_block(
    source: Source, layout: Layout, cache: Path, decoder: Decoder[EncodedImage], items: list[Item]
) -> int:
    """Read, decode and measure `items`, and commit them to the cache as one block. Returns their number.

    Raises Busy where the source (E-BUSY-060) or the decoders (061) fail for many items in a row.
    """
    reader = _Reader(source)
    answers = list(decoder.map(map(reader.read, items)))
    lost = [number for number, answer in enumerate(answers) if _is_lost(answer)]
    again = decoder.map(reader.read(items[number]) for number in lost)
    for number, answer in zip(lost, again, strict=True):
        answers[number] = answer
    _check_decoders(items, answers)
    images = [answer for answer in answers if not isinstance(answer, BadData)]
    rows = _rows(items, answers, reader.unread)
    name = artifacts.digest([key_of(item) for item in items])[:32]
    with artifacts.commit_directory(cache / f"block-{name}", {"items": len(items)}, forced=False) as folder:
        for size in {image.size: None for image in images}:
            own = [image for image in images if image.size == size]
            stored, sums = [image.stored for image in own], [image.sums for image in own]
            storage.write(folder, name_of("images", size), stored, len(own), layout.encoding)
            storage.write_array(folder / f"{name_of('low', size)}.npy", sums, len(own))
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "ascii")
    return len(items)


def _rows(
    items: Sequence[Item], answers: Sequence[EncodedImage | BadData], unread: set[str]
) -> Iterator[dict[str, Any]]:
    """The rows of items.jsonl; `unread` has the ids of items without bytes."""
    counts: Counter[Size] = Counter()
    for item, answer in zip(items, answers, strict=True):
        row: dict[str, Any] = {"id": item.id, "version": item.version}
        if isinstance(answer, BadData):
            settled = item.id not in unread and answer.code not in {*LOSSES, NO_PLUGIN}
            yield row | {"problem": list(answer.args), "settled": settled}
        else:
            number, measured = counts[answer.size], answer.measured._asdict()
            yield row | {"size": list(answer.size), "row": number, "measured": measured}
            counts[answer.size] += 1


class _Reader:
    """Reads items of a source for decoders. `unread` has the ids of those whose bytes it did not get."""

    def __init__(self, source: Source) -> None:
        self.unread: set[str] = set()
        self._source = source
        self._patience = Patience()

    def read(self, item: Item) -> Task | BadData:
        """The bytes and the name of an item, or what was wrong."""
        try:
            read = partial(self._source.read, item, self._source.limits.max_bytes)
            return self._patience.read(read, item.where), item.where
        except BadData as problem:
            if problem.code != TOO_MANY_BYTES:  # which holds as long as the item's version does
                self.unread.add(item.id)
            return problem


def _is_lost(answer: object) -> bool:
    return isinstance(answer, BadData) and answer.code in LOSSES


def _check_decoders(items: Sequence[Item], answers: Sequence[object]) -> None:
    """Raise Busy where the decoders of many items in a row were killed, even the second time."""
    killed = 0
    for item, answer in zip(items, answers, strict=True):
        killed = killed + 1 if isinstance(answer, BadData) and answer.code == KILLED else 0
        if killed > FEW:
            problem = f"its decoder was killed from outside, like those of {FEW} images before it"
            fix = "free some memory, or set fewer workers, and run it again; what was done is kept"
            raise Busy("E-BUSY-061", item.where, problem, fix)
