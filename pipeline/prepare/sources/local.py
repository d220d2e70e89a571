"""Files below a folder of this machine."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.prepare.limits import too_many_bytes
from pipeline.prepare.sources.files import (
    File,
    by_name,
    dead_link,
    is_ignored,
    kind_of_ignored,
    missing,
    not_a_plain_file,
    printable,
)
from pipeline.prepare.sources.links import Links


class LocalTree:
    """Files below a folder, by name. Links are followed as far as links.py allows."""

    def __init__(self, folder: Path, name: str, roots: Sequence[Path] = ()) -> None:
        """`name` is the folder's, for messages; `roots` are real folders that links may lead to."""
        self._folder = folder
        self._name = name
        self._links = Links(folder, roots)
        self.ignored: Counter[str] = Counter()

    def files(self) -> list[File]:
        """See `Tree.files`. Raises OSError if a folder is not there or may not be read."""
        self.ignored.clear()
        here = os.path.realpath(self._folder)
        return sorted(map(self._file, self._names("", (here,))), key=by_name)

    def _names(self, below: str, above: tuple[str, ...]) -> Iterator[str]:
        """Names of files, and of links that are not followed, below one folder.

        `above` are the real paths of that folder and of those that it lies in."""
        with os.scandir(self._folder / below) as entries:
            found = list(entries)
        for entry in found:
            name = os.path.join(below, entry.name)
            if is_ignored(entry.name):
                self.ignored[kind_of_ignored(entry.name)] += 1
            elif entry.is_dir(follow_symlinks=False):
                yield from self._names(name, (*above, os.path.join(above[-1], entry.name)))
            elif (
                entry.is_symlink()
                and os.path.isdir(self._folder / name)
                and (target := self._links.target(name))
            ):
                if str(target) in above:
                    self.ignored["links to a folder above"] += 1
                else:
                    yield from self._names(name, (*above, str(target)))
            else:
                yield name

    def _file(self, name: str) -> File:
        path = os.path.join(self._folder, name)
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            return File(name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
        where = f"{self._name}/{printable(name)}"
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(path)
            if not os.path.exists(target) or os.path.islink(target):
                return File(name, 0, target, dead_link(where, printable(os.readlink(path))))
            if self._links.target(name) is None:
                return File(name, 0, target, self._links.flaw(name, where))
            status = os.stat(path)
        flaw = None if stat.S_ISREG(status.st_mode) else not_a_plain_file(where)
        return File(name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", flaw)

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`. Only plain files are opened, and no link that leads outside is followed."""
        path, where = os.path.join(self._folder, name), f"{self._name}/{printable(name)}"
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                target = self._links.target(name)
                if target is None:
                    raise self._links.flaw(name, where)
                path = str(target)
                status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise not_a_plain_file(where)
            if status.st_size > limit:
                raise too_many_bytes(where, status.st_size, limit)
            with open(path, "rb", opener=_open_unfollowed) as file:
                content = file.read(status.st_size)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(where) from None
        if len(content) != status.st_size:
            raise OSError(errno.EIO, f"{len(content)} of {status.st_size} bytes could be read", where)
        return content


def _open_unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
