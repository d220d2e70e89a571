"""Files below a folder of this machine."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.prepare.sources.files import (
    File,
    by_name,
    is_ignored,
    missing,
    not_a_plain_file,
    printable,
    too_large,
)


class LocalTree:
    """Files below a folder, by name."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is the folder's, for messages."""
        self._folder = folder
        self._name = name

    def files(self) -> list[File]:
        """See `Tree.files`. Raises OSError if a folder is not there or may not be read."""
        return sorted(map(self._file, self._names()), key=by_name)

    def _names(self) -> Iterator[str]:
        for place, subfolders, names in os.walk(self._folder, onerror=_raise):
            links = [name for name in subfolders if os.path.islink(os.path.join(place, name))]
            subfolders[:] = [name for name in subfolders if name not in links and not is_ignored(name)]
            below = os.path.relpath(place, self._folder)
            for name in names + links:
                if not is_ignored(name):
                    yield name if below == os.curdir else os.path.join(below, name)

    def _file(self, name: str) -> File:
        status = os.lstat(self._folder / name)
        flaw = None if stat.S_ISREG(status.st_mode) else not_a_plain_file(f"{self._name}/{printable(name)}")
        return File(name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", flaw)

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`. Only plain files are opened."""
        path, where = self._folder / name, f"{self._name}/{printable(name)}"
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise not_a_plain_file(where)
            if status.st_size > limit:
                raise too_large(where, status.st_size, limit)
            with open(path, "rb", opener=_open_unfollowed) as file:
                content = file.read(status.st_size)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(where) from None
        if len(content) != status.st_size:
            raise OSError(errno.EIO, f"{len(content)} of {status.st_size} bytes could be read", where)
        return content


def _raise(exc: OSError) -> None:
    raise exc


def _open_unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
