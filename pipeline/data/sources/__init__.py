"""Where images come from. One file a source; a source lists its items, then loads them one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.config import Data
from pipeline.data.images import Pixels
from pipeline.errors import BadData


@dataclass(frozen=True)
class Item:
    """One image, not yet loaded.

    Attributes:
        id: unique name within the source.
        file: where its bytes are.
        where: its name in messages; relative.
        base: family whose members stay in one split; None: the image is its own.
        group: coarse class, and subgroup: fine class; either may be selected by `data.subset`.
        captions: clean texts, the name first; may be empty.
        flaw: why it cannot be used, where that is known before it is loaded.
    """

    id: str
    file: Path
    where: str
    base: str | None
    group: str
    subgroup: str
    captions: tuple[str, ...]
    flaw: BadData | None = None


@dataclass(frozen=True)
class Listing:
    """All items of a source in a fixed order, and remarks on what was found beside them."""

    items: tuple[Item, ...]
    notes: tuple[BadData, ...] = field(default=())


class Source(Protocol):
    """A place that images come from. `licence` is that of the images, if it is known."""

    licence: str | None

    def listing(self) -> Listing:
        """What is there, without decoding any image."""
        ...

    def load(self, item: Item) -> Pixels:
        """Pixels of one item, uint8 [R, R, 3] at the source's resolution. Raises BadData."""
        ...


def open_source(data: Data, root: Path) -> Source:
    """The source that the `data` section names; paths are relative to `root`."""
    if data.source == "folder":
        from pipeline.data.sources.folder import Folder

        return Folder(root, data.path, data.resolution, data.background)
    from pipeline.data.sources.openmoji import OpenMoji

    return OpenMoji(data.source.partition("==")[2], data.resolution, data.background)
