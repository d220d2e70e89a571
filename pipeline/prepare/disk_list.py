"""A sequence that is kept on disk, so that memory does not grow with it."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar, overload

T = TypeVar("T")
CHUNK = 512  # items that are in memory at a time


class DiskList(Sequence[T]):
    """The items of an iterable, pickled CHUNK at a time into a temporary file that has no name.

    Made to be read in order. An item by its number costs the reading of its chunk, unless it is that of the last.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the sequence
        self._starts: list[int] = []
        self._count = 0
        self._read: tuple[int, list[T]] = (-1, [])
        left = iter(items)
        while chunk := list(islice(left, CHUNK)):
            self._starts.append(self._file.tell())
            pickle.dump(chunk, self._file, pickle.HIGHEST_PROTOCOL)
            self._count += len(chunk)

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for number in range(len(self._starts)):
            yield from self._chunk(number)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(self._count))]
        number, row = divmod(range(self._count)[place], CHUNK)
        return self._chunk(number)[row]

    def _chunk(self, number: int) -> list[T]:
        if self._read[0] != number:
            self._file.seek(self._starts[number])
            self._read = number, pickle.load(self._file)
        return self._read[1]
