"""What a source of images is: it lists its items, reads them, and turns bytes into pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipeline.errors import BadData
from pipeline.prepare.framing import DecodedImage
from pipeline.prepare.limits import MAX_BYTES, Limits


class Item(NamedTuple):
    """One image, not yet read.

    Attributes:
        id: unique name within the source, by which the source finds it again.
        where: its name in messages; relative.
        version: changes when the bytes do, as far as that is known without reading them (size and time of a file).
        family: images of one family stay in one split; None if the source knows none.
        group: coarse class, and subgroup: fine class; either may be selected by `data.subset`.
        captions: clean texts, the name first; may be empty.
        flaw: why it cannot be used, where that is known before it is read.
        origin: where its captions are from, in words; empty where the source itself has them.
    """

    id: str
    where: str
    version: str
    family: str | None
    group: str
    subgroup: str
    captions: tuple[str, ...]
    flaw: BadData | None = None
    origin: str = ""


@dataclass(frozen=True)
class Listing:
    """All items of a source in a fixed order, notes on other files beside them, and the number of those that are
    passed over, by kind."""

    items: Sequence[Item]
    notes: tuple[BadData, ...] = field(default=())
    passed_over: Mapping[str, int] = field(default_factory=dict)


class Source(Protocol):
    """A place that images come from. `licence` of the images, if known; `limits` of their files."""

    licence: str | None
    limits: Limits

    def listing(self) -> Listing:
        """What is there, without decoding any image. Raises InputMissing, ConfigError, BadData."""
        ...

    def read(self, item: Item, limit: int = MAX_BYTES) -> bytes:
        """The original bytes of one item. Raises BadData where it is not a plain file, or has more than `limit`."""
        ...

    def decode(self, content: bytes, where: str) -> DecodedImage:
        """Pixels of those bytes, framed. Raises BadData. Runs in a process that may be killed."""
        ...
