"""From a source's items to decoded, measured images: in parallel, each item once, even if decoders die.

Items are processed in blocks (blocks.py). A finished block is an artifact in a cache folder and is not computed
again: an interrupted run continues, and a few new images cost little. Items are identified by id and version
(`sources.source.Item`). Of problems only those are kept that a decoder found in an item's bytes. Whatever else went
wrong (a share away, a decoder killed, too little time) is tried again, in this run and in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
from pipeline.errors import BadData
from pipeline.prepare import photos
from pipeline.prepare.blocks import Key, Layout, Work, block_maker, is_settled, key_of, name_of
from pipeline.prepare.cache_index import CacheIndex
from pipeline.prepare.disk_list import DiskList
from pipeline.prepare.framing import Pixels, Size
from pipeline.prepare.measure import ImageMeasures
from pipeline.prepare.sources.source import Item, Source

BLOCK_ITEMS = 256
CODE = Path(__file__).parent
DECODING = (  # what a decoded image depends on
    "images.py",
    "framing.py",
    "fast_decode.py",
    "pillow.py",
    "photos.py",
    "limits.py",
    "measure.py",
    "decoder.py",
    "sources",
)
LIBRARIES = ("numpy", "pillow", "torchvision", "kornia-rs", "resvg-py", *photos.LIBRARIES)
TaskMapper = Callable[[Callable[[], AbstractContextManager[Work]], Sequence[list[Item]]], Iterable[int]]
OnProgress = Callable[[int, int], None]  # (done, total)


class IngestedItem(NamedTuple):
    """The result for one item: an image, row `row` of those of its size (width, height) in its block, with its
    measures; or a problem.

    passing: whether the problem may be gone the next time.
    earlier: why an earlier run could not read or decode it, if so and this one could.
    """

    item: Item
    block: Path
    row: int
    measured: ImageMeasures | None
    problem: BadData | None
    passing: bool = False
    earlier: BadData | None = None
    size: Size = (0, 0)


def run_locally(
    make: Callable[[], AbstractContextManager[Work]], blocks: Sequence[list[Item]]
) -> Iterator[int]:
    """A `TaskMapper` that runs one block after another in this process."""
    with make() as work:
        yield from map(work, blocks)


def cache_key(data: Data, layout: Layout, sizes: tuple[Size, ...]) -> str:
    """Digest of everything except the items that a stored image depends on: source, framing (with the sizes of
    buckets), code and libraries."""
    files = sorted(file for name in DECODING for file in [CODE / name, *(CODE / name).glob("*.py")])
    code = {str(file.relative_to(CODE)): artifacts.sha256_file(file) for file in files if file.is_file()}
    fields = {"source", "path", "resolution", "fit", "background", "max_bytes", "max_pixels"}
    settings = data.model_dump(mode="json", include=fields)
    settings |= {"layout": list(layout), "sizes": list(sizes)}
    return artifacts.digest(
        {
            "settings": settings,
            "code": code,
            "libraries": {name: _version(name) for name in LIBRARIES},
        }
    )


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # an extra
        return ""


def ingest(
    source: Source,
    items: Sequence[Item],
    layout: Layout,
    cache: Path,
    map_tasks: TaskMapper,
    processes: int,
    on_progress: OnProgress,
) -> DiskList[IngestedItem]:
    """Decode and measure all `items`, in their order.

    Args:
        cache: folder of finished blocks; `map_tasks` runs those that it lacks.
        processes: decoding processes beside each worker of `map_tasks`.
        on_progress: called with (items done, items in all).
    """
    cache.mkdir(parents=True, exist_ok=True)
    known = CacheIndex(cache)
    known.add(artifacts.verify_directory)
    missing = DiskList(item for item in items if item.flaw is None and not known.is_settled(key_of(item)))
    before = {key: found[1] for key in map(key_of, missing) if (found := known.find(key)) is not None}
    done = len(items) - len(missing)
    on_progress(done, len(items))
    if missing:
        for count in map_tasks(partial(block_maker, source, layout, cache, processes), _Blocks(missing)):
            done += count
            on_progress(done, len(items))
        known.add(artifacts.read_manifest)  # these were hashed a moment ago
    used: set[Path] = set()
    ingested = DiskList(_noted(map(partial(_ingested, known, before), items), used))
    _remove_unused(cache, used)
    return ingested


def _noted(items: Iterable[IngestedItem], used: set[Path]) -> Iterator[IngestedItem]:
    """`items`, the blocks of which are added to `used`."""
    for each in items:
        used.add(each.block)
        yield each


class _Blocks(Sequence[list[Item]]):
    """Items, BLOCK_ITEMS at a time."""

    def __init__(self, items: DiskList[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return -(-len(self._items) // BLOCK_ITEMS)

    def __getitem__(self, number: Any) -> Any:
        start = range(len(self))[number] * BLOCK_ITEMS
        return self._items[start : start + BLOCK_ITEMS]


def _ingested(known: CacheIndex, before: Mapping[Key, dict[str, Any]], item: Item) -> IngestedItem:
    """The result for one item, given what the cache holds, and what it held before of those tried again."""
    if item.flaw is not None:
        return IngestedItem(item, known.folder, -1, None, item.flaw)
    key = key_of(item)
    found = known.find(key)
    assert found is not None, item.id
    block, row = found
    if "problem" in row:
        return IngestedItem(item, block, -1, None, BadData(*row["problem"]), not is_settled(row))
    earlier = BadData(*before[key]["problem"]) if key in before else None
    measured, (width, height) = ImageMeasures(**row["measured"]), row["size"]
    return IngestedItem(item, block, row["row"], measured, None, earlier=earlier, size=(width, height))


def _remove_unused(cache: Path, used: set[Path]) -> None:
    """Remove the blocks that hold none of the items."""
    for block in cache.glob("block-*"):
        if block not in used:
            artifacts.remove(block)


def stored_images(items: Iterable[IngestedItem]) -> Iterator[Pixels]:
    """The images, as they are stored, of items that have one."""
    return _rows(items, lambda block, size: storage.Pictures(block, name_of("images", size)).stored)


def stored_sums(items: Iterable[IngestedItem]) -> Iterator[NDArray[np.uint16]]:
    """Their box sums, uint16 [3, h, w]."""

    def open_sums(block: Path, size: Size) -> Callable[[int], NDArray[np.uint16]]:
        sums: NDArray[np.uint16] = storage.open_array(block / f"{name_of('low', size)}.npy")
        return sums.__getitem__

    return _rows(items, open_sums)


def images_of(items: Iterable[IngestedItem]) -> Iterator[Pixels]:
    """The images, uint8 [H, W, 3]."""
    for stored in stored_images(items):
        yield np.ascontiguousarray(storage.decode(stored).transpose(1, 2, 0))


def _rows(
    items: Iterable[IngestedItem], open_block: Callable[[Path, Size], Callable[[int], Any]]
) -> Iterator[Any]:
    """One row per item; a block is opened once for consecutive items of one size."""
    for (block, size), run in groupby(items, key=lambda each: (each.block, each.size)):
        read = open_block(block, size)
        for each in run:
            yield read(each.row)
