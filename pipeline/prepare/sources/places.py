"""Where archives and Parquet files lie: their readers seek in them, so those behind a URL are copied to a disk.

Copies are made one file at a time, at the first use in any process, a few ahead. They stay for the next run, in a
cache of MAX_BYTES. A copy has the version of its file in its name: where
that changes, it is fetched again.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.data.cache import Cache
from pipeline.prepare.sources.files import File, missing, printable
from pipeline.prepare.sources.local import LocalTree
from pipeline.prepare.sources.remote import RemoteTree

COPIES = "runs/prepare/copies"
MAX_BYTES = 16 * 2**30  # of all copies together
AHEAD = 4  # files that are fetched while one is read
IN_USE = 2 * AHEAD  # newest copies, which are never removed


class Place(Protocol):
    """One file, or the files of a folder. single: whether it is one; its name in messages is then the place's."""

    name: str
    single: bool
    ignored: Counter[str]  # by the last call of `files`

    def files(self) -> list[File]:
        """All files; none where there is no such place."""
        ...

    def has(self, name: str) -> bool:
        """Whether a file is there; of a URL, when it was listed last."""
        ...

    def paths(self, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
        """Each of the files on a disk, in order."""
        ...

    def path(self, name: str) -> Path:
        """A file on a disk."""
        ...


def open_place(root: Path, path: str) -> Place:
    """The file or folder `root / path`, which need not be there, or the one behind the URL `path`."""
    return Copies(path, root / COPIES) if "://" in path else Disk(root / path, path)


def name_in(place: Place, name: str) -> str:
    """How a file of a place is named in messages."""
    return place.name if place.single else f"{place.name}/{printable(name)}"


class Disk:
    """A file or folder of this machine."""

    def __init__(self, place: Path, name: str) -> None:
        self._place, self.name = place, name.rstrip("/")
        self.single = not place.is_dir()
        self.ignored: Counter[str] = Counter()

    def files(self) -> list[File]:
        """See `Place.files`."""
        if not self._place.exists():
            return []
        if self.single:
            status = self._place.stat()
            return [File(self._place.name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")]
        tree = LocalTree(self._place, self.name)
        files = tree.files()
        self.ignored = tree.ignored
        return files

    def has(self, name: str) -> bool:
        """See `Place.has`."""
        return self.path(name).is_file()

    def paths(self, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
        """See `Place.paths`."""
        return ((name, self.path(name)) for name in names)

    def path(self, name: str) -> Path:
        """See `Place.path`."""
        return self._place if self.single else self._place / name


class Copies:
    """A file or folder behind a URL. Raises StorageError where its store does not answer."""

    def __init__(self, url: str, folder: Path) -> None:
        self.name, self._cache = url.rstrip("/"), Cache(folder, MAX_BYTES, keep=IN_USE)
        parent, _, last = self.name.rpartition("/")
        self.single = last.lower().endswith((".parquet", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz"))
        self._only = last if self.single else None
        self._tree = RemoteTree(parent if self.single else self.name)
        self._files: dict[str, File] = {}
        self.ignored: Counter[str] = Counter()

    def files(self) -> list[File]:
        """See `Place.files`."""
        files = [file for file in self._tree.files() if self._only in (None, file.name)]
        self.ignored = Counter() if self.single else self._tree.ignored
        self._files = {file.name: file for file in files}
        return files

    def has(self, name: str) -> bool:
        """See `Place.has`."""
        if not self._files:  # in another process than the one that listed them
            self.files()
        return name in self._files

    def paths(self, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
        """See `Place.paths`."""
        pending: deque[tuple[str, Future[Path]]] = deque()
        with ThreadPoolExecutor(AHEAD) as pool:
            for name in names:
                pending.append((name, pool.submit(self.path, name)))
                if len(pending) > AHEAD:
                    first, path = pending.popleft()
                    yield first, path.result()
            for first, path in pending:
                yield first, path.result()

    def path(self, name: str) -> Path:
        """See `Place.path`."""
        if not self.has(name):
            raise missing(name_in(self, name))
        version = f"{self.name}\n{name}\n{self._files[name].version}"
        copy = hashlib.sha256(version.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        file = self._files[name]
        return self._cache.path(copy, file.size, partial(self._tree.fetch, file))
