"""Trees of files that sources read: a folder, a store behind a URL, a zip or a tar archive.

All give the same: names, sizes and versions without the contents, then the bytes of one file. Links are followed in
folders alone, and only to where they may lead (links.py). Nothing but plain files is opened, and no archive is ever
unpacked to a disk. What a tree should not hold is listed with its flaw and cannot be read. Trees hold names only:
they open files at the first use in each process, and pickle without them. One thread at a time may use a tree.
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, Protocol, TypeVar

from pipeline.errors import BadData, PipelineError, reason

_JUNK = {"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "$RECYCLE.BIN", "Icon\r"}
_ESCAPED = re.compile(r"\\(\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_SHORT = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}
T = TypeVar("T")


class File(NamedTuple):
    """A file of a tree.

    Attributes:
        name: relative path, POSIX, by which the tree finds it again; any characters (see `printable`).
        size: bytes, as the tree declares it.
        version: changes when the bytes do, as far as that is known without reading them.
        flaw: why it cannot be read, if so.
    """

    name: str
    size: int
    version: str
    flaw: BadData | None = None


class Tree(Protocol):
    """Files below one root, in a fixed order. Hidden files and those of desktops are ignored, but counted."""

    ignored: Counter[str]  # by the last call of `files`

    def files(self) -> list[File]:
        """All files. Raises InputMissing if there is no such tree, BadData if it is damaged as a whole."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of one file. Raises BadData if it is flawed, damaged, or has more than `limit` bytes."""
        ...


def printable(name: str) -> str:
    r"""A name on one line, every character visible and in UTF-8; `original` undoes it.

    Bytes that are not UTF-8 become `\xff`, controls `\n` or `\u202e`, a backslash two.
    """
    return name if name.isprintable() and "\\" not in name else "".join(map(_escape, name))


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # A byte that is not UTF-8, as os.fsdecode and tarfile hold it.
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return char.encode("unicode_escape").decode("ascii")
    if char.isprintable():
        return char
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def original(text: str) -> str:
    """The inverse of `printable`."""
    return _ESCAPED.sub(lambda match: _unescape(match[1]), text)


def _unescape(escape: str) -> str:
    if escape in _SHORT:
        return _SHORT[escape]
    code = int(escape[1:], 16)
    return chr(code + 0xDC00 if escape[0] == "x" and code >= 0x80 else code)


def folded(name: str) -> str:
    """A name without case, and with each accent in its letter, which a Mac writes as two characters."""
    return unicodedata.normalize("NFC", name).casefold()


def by_name(file: File) -> bytes:
    return file.name.encode("utf-8", "surrogatepass")


def is_ignored(part: str) -> bool:
    return part.startswith(".") or part in _JUNK


def kind_of_ignored(part: str) -> str:
    """How a name for which `is_ignored` holds is counted."""
    return printable(part) if part in _JUNK else "hidden"


def not_a_plain_file(where: str) -> BadData:
    return BadData("E-IMG-007", where, "is not a plain file", "replace it by one")


class Unread(BadData):
    """A file that could not be read, which says nothing about its bytes: another attempt may read it."""


def dead_link(where: str, target: str) -> BadData:
    return BadData(
        "E-IMG-007", where, f"is a link to {target}, which is not there", "put it back, or remove the link"
    )


def missing(where: str) -> Unread:
    return Unread("E-IMG-011", where, "is no longer there", "put it back, or run it again")


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def damage(code: str, where: str, fix: str) -> Iterator[None]:
    """Turn any exception of a reader of damaged bytes into BadData, except errors of the disk."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as exc:
        # EINVAL: sent to a place where no file reaches.
        if isinstance(exc, OSError) and exc.errno not in {None, errno.EINVAL}:
            raise
        raise BadData(code, where, f"is damaged or cut off ({reason(exc)})", fix) from None


class PerProcess(Generic[T]):
    """A value created at its first use in a process: two processes must not share the position in an open file."""

    def __init__(self) -> None:
        self._value: tuple[int, T] | None = None

    def __del__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the value, closing it if it can be closed; the next `get` creates it again."""
        value, self._value = self._value, None
        close = getattr(value and value[1], "close", None)
        if close is not None:
            close()

    def get(self, make: Callable[[], T]) -> T:
        """The value, from `make` if this process has none."""
        if self._value is None or self._value[0] != os.getpid():
            self.clear()
            self._value = os.getpid(), make()
        return self._value[1]

    def __reduce__(self) -> tuple[type[PerProcess[T]], tuple[()]]:
        return type(self), ()
