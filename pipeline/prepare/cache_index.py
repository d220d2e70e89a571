"""What the blocks of a cache hold (blocks.py): a few bytes of memory an item, and rows when asked for."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.errors import PipelineError
from pipeline.prepare.blocks import Key, is_settled

Row = dict[str, Any]
OPEN_BLOCKS = 64  # whose rows are in memory


class CacheIndex:
    """Finds the rows of items in the blocks below `folder`. Of several rows of one item a settled one counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blocks: list[Path] = []
        self._keys = np.zeros(0, np.uint64)  # sorted
        self._places = np.zeros(0, np.int64)  # of each: settled, block, line, in this order
        self._rows = lru_cache(OPEN_BLOCKS)(_read_rows)

    def add(self, check: Callable[[Path], object]) -> None:
        """Take in the blocks of which nothing is known, or only items to be tried again. Blocks for which `check`
        raises are removed."""
        settled = self._places[self._places >= _SETTLED]
        read = {self._blocks[number] for number in np.unique(settled >> _LINES & _BLOCKS).tolist()}
        self._rows.cache_clear()
        keys, places = array("Q"), array("q")
        for block in sorted(set(self.folder.glob("block-*")) - read):
            try:
                check(block)
            except PipelineError:  # half-written by a killed run, or damaged since: computed again
                artifacts.remove(block)
                continue
            for line, row in enumerate(_read_rows(block)):
                keys.append(_hash((row["id"], row["version"])))
                places.append(is_settled(row) * _SETTLED + (len(self._blocks) << _LINES) + line)
            self._blocks.append(block)
        old = self._places >= _SETTLED
        self._merge(
            np.concatenate([self._keys[old], np.frombuffer(keys, np.uint64)]),
            np.concatenate([self._places[old], np.frombuffer(places, np.int64)]),
        )

    def _merge(self, keys: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
        order = np.lexsort((places, keys))
        keys, places = keys[order], places[order]
        last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        self._keys, self._places = keys[last], places[last]

    def _find(self, key: Key) -> int:
        """The place of an item, or -1."""
        value = _hash(key)
        number = int(np.searchsorted(self._keys, np.uint64(value)))
        found = number < len(self._keys) and int(self._keys[number]) == value
        return int(self._places[number]) if found else -1

    def is_settled(self, key: Key) -> bool:
        """Whether what the cache has of an item holds for every later run."""
        return self._find(key) >= _SETTLED

    def find(self, key: Key) -> tuple[Path, Row] | None:
        """The block of an item and its row there; None where it is not known."""
        place = self._find(key)
        if place < 0:
            return None
        block = self._blocks[place >> _LINES & _BLOCKS]
        row = self._rows(block)[place & (1 << _LINES) - 1]
        assert (row["id"], row["version"]) == key, "two items have one hash of 64 bits"
        return block, row


_LINES = 20  # bits of a place that hold the line in its block
_BLOCKS = (1 << 40) - 1
_SETTLED = 1 << 62


def _hash(key: Key) -> int:
    content = "\0".join(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _read_rows(block: Path) -> list[Row]:
    return [json.loads(line) for line in (block / "items.jsonl").read_text("ascii").splitlines()]
