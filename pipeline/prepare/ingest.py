"""From a source's items to decoded, measured images: in parallel, each item once, even if decoders die.

Items are processed in blocks. A finished block is an artifact in a cache folder (images, low.npy, items.jsonl) and
is not computed again: an interrupted run continues, and a few new images cost little. Items are identified by id
and version (`sources.source.Item`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.config.params import Data
from pipeline.data import storage
from pipeline.errors import BadData, PipelineError
from pipeline.prepare.decoder import Decoder, Task
from pipeline.prepare.framing import DecodedImage, Pixels
from pipeline.prepare.measure import ImageMeasures, measure
from pipeline.prepare.shards import box_sums
from pipeline.prepare.sources.source import Item, Source

BLOCK_ITEMS = 256
CODE = Path(__file__).parent
DECODING = (  # what a decoded image depends on
    "images.py",
    "framing.py",
    "fast_decode.py",
    "pillow.py",
    "measure.py",
    "decoder.py",
    "sources",
)
LIBRARIES = ("numpy", "pillow", "torchvision", "kornia-rs", "resvg-py")
Work = Callable[[list[Item]], int]
TaskMapper = Callable[[Callable[[], AbstractContextManager[Work]], Sequence[list[Item]]], Iterable[int]]
OnProgress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class IngestedItem:
    """The result for one item: an image, row `row` of its block, with its measures; or a problem."""

    item: Item
    block: Path
    row: int
    measured: ImageMeasures | None
    problem: BadData | None


def run_locally(
    make: Callable[[], AbstractContextManager[Work]], blocks: Sequence[list[Item]]
) -> Iterator[int]:
    """A `TaskMapper` that runs one block after another in this process."""
    with make() as work:
        yield from map(work, blocks)


class Layout(NamedTuple):
    """How images are stored: see `pipeline.prepare.shards`."""

    resolution: int
    low_resolution: int
    encoding: str


def cache_key(data: Data, layout: Layout) -> str:
    """Digest of everything except the items that a stored image depends on: source, framing, code and libraries."""
    files = sorted(file for name in DECODING for file in [CODE / name, *(CODE / name).glob("*.py")])
    code = {str(file.relative_to(CODE)): artifacts.sha256_file(file) for file in files if file.is_file()}
    settings = data.model_dump(mode="json", include={"source", "path", "resolution", "fit", "background"})
    settings |= {"layout": list(layout)}
    return artifacts.digest(
        {
            "settings": settings,
            "code": code,
            "libraries": {name: metadata.version(name) for name in LIBRARIES},
        }
    )


def ingest(
    source: Source,
    items: Sequence[Item],
    layout: Layout,
    cache: Path,
    map_tasks: TaskMapper,
    processes: int,
    on_progress: OnProgress,
) -> list[IngestedItem]:
    """Decode and measure all `items`, in their order.

    Args:
        cache: folder of finished blocks; `map_tasks` runs those that it lacks.
        processes: decoding processes beside each worker of `map_tasks`.
        on_progress: called with (items done, items in all).
    """
    cache.mkdir(parents=True, exist_ok=True)
    known = _known(cache, artifacts.verify_directory)
    missing = [item for item in items if _key(item) not in known]
    blocks = [missing[i : i + BLOCK_ITEMS] for i in range(0, len(missing), BLOCK_ITEMS)]
    done = len(items) - len(missing)
    on_progress(done, len(items))
    if blocks:
        for count in map_tasks(partial(block_maker, source, layout, cache, processes), blocks):
            done += count
            on_progress(done, len(items))
        # These were hashed a moment ago.
        known |= _known(cache, artifacts.read_manifest, {block for block, _ in known.values()})
    ingested = [_ingested(item, *known[_key(item)]) for item in items]
    _remove_unused(cache, {each.block for each in ingested})
    return ingested


def _key(item: Item) -> tuple[str, str]:
    return item.id, item.version


@contextmanager
def block_maker(source: Source, layout: Layout, cache: Path, processes: int) -> Iterator[Work]:
    """`make_block` with decoding processes of its own."""
    with Decoder(source.decode, processes, finish=partial(encode_images, layout)) as decoder:
        yield partial(make_block, source, layout, cache, decoder)


class EncodedImage(NamedTuple):
    """What a decoder returns for an image."""

    stored: Pixels  # see `storage.encode`
    sums: NDArray[np.uint16]  # see `shards.box_sums`
    measured: ImageMeasures


def encode_images(layout: Layout, images: list[DecodedImage]) -> list[EncodedImage]:
    """Measure decoded images and encode them as they are stored."""
    measured = measure(images)
    planes = [np.ascontiguousarray(image.pixels.transpose(2, 0, 1)) for image in images]
    return [
        EncodedImage(
            storage.encode(pixels, layout.encoding), box_sums(pixels, layout.low_resolution), numbers
        )
        for pixels, numbers in zip(planes, measured, strict=True)
    ]


def make_block(
    source: Source, layout: Layout, cache: Path, decoder: Decoder[EncodedImage], items: list[Item]
) -> int:
    """Read, decode and measure `items`, and commit them to the cache as one block. Returns their number."""
    rows: list[dict[str, Any]] = []
    stored: list[Pixels] = []
    sums: list[NDArray[np.uint16]] = []
    tasks = (_read(source, item) for item in items)
    for item, answer in zip(items, decoder.map(tasks), strict=True):
        row: dict[str, Any] = {"id": item.id, "version": item.version}
        if isinstance(answer, BadData):
            row["problem"] = list(answer.args)
        else:
            row |= {"row": len(stored), "measured": answer.measured._asdict()}
            stored.append(answer.stored)
            sums.append(answer.sums)
        rows.append(row)
    name = artifacts.digest([_key(item) for item in items])[:32]
    with artifacts.commit_directory(cache / f"block-{name}", {"items": len(items)}, forced=False) as folder:
        storage.write(folder, "images", stored, len(stored), layout.encoding)
        storage.write_array(folder / "low.npy", sums, len(sums))
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "ascii")
    return len(items)


def _read(source: Source, item: Item) -> Task | BadData:
    if item.flaw is not None:
        return item.flaw
    try:
        return source.read(item), item.where
    except BadData as problem:
        return problem


def _known(
    cache: Path, check: Callable[[Path], object], read: Set[Path] = frozenset()
) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    """All items in the cache, except those of the blocks `read`, by id and version. Blocks for which `check` raises
    are removed."""
    known = {}
    for block in sorted(set(cache.glob("block-*")) - read):
        try:
            check(block)
        except PipelineError:  # half-written by a killed run, or damaged since: computed again
            artifacts.remove(block)
            continue
        for line in (block / "items.jsonl").read_text("ascii").splitlines():
            row = json.loads(line)
            known[row["id"], row["version"]] = block, row
    return known


def _ingested(item: Item, block: Path, row: dict[str, Any]) -> IngestedItem:
    if item.flaw is not None or "problem" in row:
        return IngestedItem(item, block, -1, None, item.flaw or BadData(*row["problem"]))
    return IngestedItem(item, block, row["row"], ImageMeasures(**row["measured"]), None)


def _remove_unused(cache: Path, used: set[Path]) -> None:
    """Remove the blocks that hold none of the items."""
    for block in cache.glob("block-*"):
        if block not in used:
            artifacts.remove(block)


def stored_images(items: Iterable[IngestedItem]) -> Iterator[Pixels]:
    """The images, as they are stored, of items that have one."""
    return _rows(items, lambda block: storage.Pictures(block, "images").stored)


def stored_sums(items: Iterable[IngestedItem]) -> Iterator[NDArray[np.uint16]]:
    """Their box sums, uint16 [3, r, r]."""
    return _rows(items, lambda block: np.load(block / "low.npy", mmap_mode="r").__getitem__)


def images_of(items: Iterable[IngestedItem]) -> Iterator[Pixels]:
    """The images, uint8 [R, R, 3]."""
    for stored in stored_images(items):
        yield np.ascontiguousarray(storage.decode(stored).transpose(1, 2, 0))


def _rows(items: Iterable[IngestedItem], open_block: Callable[[Path], Callable[[int], Any]]) -> Iterator[Any]:
    """One row per item; a block is opened once for consecutive items."""
    for block, run in groupby(items, key=lambda each: each.block):
        read = open_block(block)
        for each in run:
            yield read(each.row)
