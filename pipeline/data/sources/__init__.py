"""Where images come from. One file a source; a source lists its items, reads them, and turns bytes into pixels.

A source holds paths and settings only, so that it can be sent to other processes and machines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.config import SOURCES, Data
from pipeline.data.images import MAX_BYTES, Framing, Picture
from pipeline.errors import BadData, ConfigError


@dataclass(frozen=True)
class Item:
    """One image, not yet read.

    Attributes:
        id: unique name within the source, by which the source finds it again.
        where: its name in messages; relative.
        version: changes when the bytes do, as far as that is known without reading them (size and time of a file).
        base: family whose members stay in one split; None: the image is its own.
        group: coarse class, and subgroup: fine class; either may be selected by `data.subset`.
        captions: clean texts, the name first; may be empty.
        flaw: why it cannot be used, where that is known before it is read.
    """

    id: str
    where: str
    version: str
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
        """What is there, without decoding any image. Raises InputMissing, ConfigError, BadData."""
        ...

    def read(self, item: Item, most: int = MAX_BYTES) -> bytes:
        """The original bytes of one item. Raises BadData where it is no plain file, or has more than `most`."""
        ...

    def decode(self, content: bytes, where: str) -> Picture:
        """Pixels of those bytes, framed. Raises BadData. Runs in a process that may be killed."""
        ...


def open_source(data: Data, root: Path) -> Source:
    """The source that the `data` section names; paths are relative to `root`."""
    framing = Framing(data.resolution, data.fit, data.background)
    kind, _, name = data.source.partition(":")
    if kind == "folder":
        from pipeline.data.sources.folder import Folder

        return Folder(root, data.path, framing)
    if kind == "archive":
        from pipeline.data.sources.archive import Archive

        return Archive(root, data.path, framing)
    if kind == "parquet":
        from pipeline.data.sources.parquet import Parquet

        return Parquet(root, data.path, framing)
    if kind == "torchvision":
        from pipeline.data.sources.torchvision import Torchvision

        return Torchvision(root, data.path, name, framing)
    from pipeline.data.sources.openmoji import OpenMoji

    return OpenMoji(data.source.partition("==")[2], framing)


def data_of(data: Data, source: str, root: Path) -> Data:
    """`data` with another source: one as params.yaml names it, or the path of a folder or file.

    Raises ConfigError where it is neither.
    """
    path = root / source
    if re.fullmatch(SOURCES, source) and not path.exists():
        return data.model_copy(update={"source": source, "subset": ()})
    if "://" in source or path.is_dir():
        kind = "parquet" if path.is_dir() and any(path.glob("*.parquet")) else "folder"
    elif path.is_file():
        kind = "parquet" if path.suffix == ".parquet" else "archive"
    else:
        fix = "give a folder, an archive, a Parquet file, torchvision:NAME or openmoji==VERSION"
        raise ConfigError("E-CFG-016", "SOURCE", f"{source!r} is neither there nor a known source", fix)
    return data.model_copy(update={"source": kind, "path": source, "subset": ()})
