"""Where a prepared data set lies: in a folder of this machine, or behind a URL with a cache in between.

`push` copies an artifact folder to URL/DIGEST. Its files are fetched from there when they are first needed, and
each is compared with the manifest's sha256, after it was fetched and when a process first meets it in the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from pipeline import artifacts
from pipeline.artifacts import MANIFEST
from pipeline.data.cache import Cache
from pipeline.data.store import open_store, store_error
from pipeline.errors import Busy, ConfigError, InputMissing, PipelineError, StorageError

T = TypeVar("T")
Identity = tuple[int, int, int]  # of a file: device, inode, bytes
Stamp = tuple[Identity, int]  # and when it was last changed, in ns
WAITS = (1.0, 3.0, 10.0, 30.0, 60.0)  # seconds before each further attempt at a store that is away
AT_ONCE = 4  # files that are sent, or fetched ahead, at the same time
LOST = 10  # times that a file may be removed from a cache, between its fetch and its use


class Folder(Protocol):
    """An artifact folder: `where` it is for messages, and its manifest."""

    where: str
    manifest: dict[str, Any]

    @property
    def room(self) -> int:
        """Bytes that may be fetched ahead."""
        ...

    def open(self, names: Sequence[str], read: Callable[[Path], T]) -> T:
        """`read(folder)`, in which the files `names` are; what it returned before, where these are the same."""
        ...

    def expect(self, names: Iterable[str]) -> None:
        """Tell that files will be opened soon."""
        ...

    def check(self) -> None:
        """Raise Busy where files have changed since the folder was opened."""
        ...


class LocalFolder:
    """A folder of this machine. Its files are not verified, as whoever starts a stage has done that; `check` tells
    whether they still are the same."""

    room = 0

    def __init__(self, path: Path) -> None:
        if not (path / MANIFEST).is_file():
            raise InputMissing("E-INP-010", str(path), "no prepared data set here", "run `dvc repro prepare`")
        self.where, self._path = str(path), path
        self.manifest = artifacts.read_manifest(path)
        self._stamps = {name: _stamp(path / name) for name in (*self.manifest["files"], MANIFEST)}
        self._opened: dict[str, Any] = {}

    def open(self, names: Sequence[str], read: Callable[[Path], T]) -> T:
        """See `Folder.open`."""
        if names[0] not in self._opened:
            self._opened[names[0]] = read(self._path)
        opened: T = self._opened[names[0]]
        return opened

    def expect(self, names: Iterable[str]) -> None:
        """See `Folder.expect`."""

    def check(self) -> None:
        """See `Folder.check`. One that was only touched, or replaced by its equal, has not."""
        for name, before in self._stamps.items():
            path = self._path / name
            stamp = _stamp(path)
            if stamp != before:
                if stamp is None or not self._is_same(name, path):
                    raise changed(str(path))
                self._stamps[name] = stamp

    def _is_same(self, name: str, path: Path) -> bool:
        if name == MANIFEST:
            return artifacts.parse_manifest(path.read_bytes(), str(path)) == self.manifest
        return _agrees(path, self.manifest["files"][name])


class FarFolder:
    """What `push` returned.

    Raises InputMissing or AccessError, Busy where its store is away for long, and ConfigError where the cache is
    too small for one of the files."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.where, self._cache, self._digest = url, cache, url.rpartition("/")[2]
        self._store, self._path = open_store(url)
        content = patiently(lambda: self._store.cat_file(f"{self._path}/{MANIFEST}"), f"{url}/{MANIFEST}")
        self.manifest = artifacts.parse_manifest(content, f"{url}/{MANIFEST}")
        if self.manifest["digest"] != self._digest:
            raise _damaged(f"{url}/{MANIFEST}")
        size, name = max((about["size"], name) for name, about in self.manifest["files"].items())
        if size > cache.max_bytes:
            problem = f"has {size / 2**30:.3g} GiB, more than the cache may hold"
            raise ConfigError("E-CFG-061", f"{url}/{name}", problem, "raise cache_gib of the profile")
        self._met: dict[str, Identity] = {}
        self._opened: dict[str, tuple[list[Identity], Any]] = {}
        self._expected: SimpleQueue[str] = SimpleQueue()
        self._fetchers: list[threading.Thread] = []

    @property
    def room(self) -> int:
        """See `Folder.room`."""
        return self._cache.max_bytes // 2

    def path(self, name: str) -> Path:
        """A file in the cache; its bytes are those that the manifest tells of."""
        size = int(self.manifest["files"][name]["size"])
        fetch = partial(self._fetch, name)
        for _ in range(LOST):
            path = self._cache.path(f"{self._digest}/{name}", size, fetch)
            try:
                if self._is_sound(name, path):
                    return path
                path.unlink()
            except FileNotFoundError:
                continue
        raise self._lost(name)

    def open(self, names: Sequence[str], read: Callable[[Path], T]) -> T:
        """See `Folder.open`. What was opened is let go when its file has left the cache."""
        for _ in range(LOST):
            paths = [self.path(name) for name in names]
            try:
                files = [_identity(path.stat()) for path in paths]
                known = self._opened.get(names[0])
                if known is None or known[0] != files:
                    self._let_go()
                    known = self._opened[names[0]] = files, read(paths[0].parent)
            except FileNotFoundError:
                continue
            opened: T = known[1]
            return opened
        raise self._lost(names[0])

    def expect(self, names: Iterable[str]) -> None:
        """See `Folder.expect`: fetches them meanwhile, AT_ONCE at a time."""
        for name in names:
            self._expected.put(name)
        self._fetchers = [each for each in self._fetchers if each.is_alive()]
        for _ in range(min(AT_ONCE - len(self._fetchers), self._expected.qsize())):
            # Not those of an executor, for which the process would wait at its end.
            self._fetchers.append(threading.Thread(target=self._fetch_ahead, daemon=True))
            self._fetchers[-1].start()

    def check(self) -> None:
        """See `Folder.check`: nothing, since what is in the store is named by its digest."""

    def _fetch_ahead(self) -> None:
        """Fetch what is expected, until nothing is."""
        with contextlib.suppress(Empty):
            while True:
                name = self._expected.get_nowait()
                with contextlib.suppress(
                    PipelineError, OSError
                ):  # Whoever opens the file meets the same, and tells.
                    self.path(name)

    def _let_go(self) -> None:
        """Forget what was opened of files that are in the cache no more: it takes their place on the disk."""
        folder = self._cache.folder / self._digest
        gone = [name for name in self._opened if not (folder / name).exists()]
        for name in gone:
            del self._opened[name]

    def _lost(self, name: str) -> ConfigError:
        problem = "left the cache before it was read, again and again"
        return ConfigError("E-CFG-061", f"{self.where}/{name}", problem, "raise cache_gib of the profile")

    def _is_sound(self, name: str, path: Path) -> bool:
        """Whether a file has the right bytes, as read when this process first meets it."""
        identity = _identity(path.stat())
        if self._met.get(name) != identity:
            if not _agrees(path, self.manifest["files"][name]):
                return False
            self._met[name] = identity
        return True

    def _fetch(self, name: str, path: Path) -> None:
        where, about = f"{self.where}/{name}", self.manifest["files"][name]

        def fetch() -> None:
            self._store.get_file(f"{self._path}/{name}", str(path))
            if path.stat().st_size < about["size"]:
                raise EOFError(f"{path.stat().st_size} of {about['size']} bytes")

        for _ in range(2):  # Bytes may change on their way.
            patiently(fetch, where)
            if _agrees(path, about):
                return
        raise _damaged(where)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size


def _stamp(path: Path) -> Stamp | None:
    """Of a file; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return _identity(status), status.st_mtime_ns


def changed(where: str) -> Busy:
    """The error for data that are not those with which a run has begun."""
    problem = (
        "has changed since the stage began; what was trained on it since the last checkpoint is not kept"
    )
    return Busy(
        "E-BUSY-180", where, problem, "run the stage again: on other data it begins anew, else it goes on"
    )


def _agrees(path: Path, about: dict[str, Any]) -> bool:
    """Whether a file has the size and sha256 that a manifest says."""
    return path.stat().st_size == about["size"] and artifacts.sha256_file(path) == about["sha256"]


def _damaged(where: str) -> StorageError:
    fix = "remove it there and run the stage again, which sends it anew"
    return StorageError("E-IO-062", where, "differs from what was sent", fix)


def patiently(work: Callable[[], T], where: str, failed: str = "cannot be fetched") -> T:
    """`work()`, tried again after WAITS while its store is away."""
    for wait in (*WAITS, None):
        try:
            return work()
        except FileNotFoundError:
            fix = "run the stage again, which sends it, or correct `data` of the compute profile"
            raise InputMissing("E-INP-012", where, "is not in the store", fix) from None
        except Exception as exc:  # Each store has its own.
            if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            error = store_error(exc, where, failed)
            if wait is None or not isinstance(error, Busy):
                raise error from None
        time.sleep(wait)
    raise AssertionError("the last attempt ends the loop")


def push(path: Path, url: str, log: Callable[[str], None]) -> str:
    """Copy an artifact folder, which was verified, to a URL, and return that of the copy: `url`/DIGEST.

    Files that are there already, with the right size, are not sent again; the manifest is sent last. Raises as
    FarFolder.
    """
    manifest = artifacts.read_manifest(path)
    target = f"{url.rstrip('/')}/{manifest['digest']}"
    store, place = open_store(target)
    sizes = {name: about["size"] for name, about in manifest["files"].items()}
    there = patiently(partial(_sizes, store, place), target, "cannot be listed")
    missing = [name for name, size in sizes.items() if there.get(name) != size]

    def send(name: str) -> None:
        put = partial(store.put_file, str(path / name), f"{place}/{name}")
        patiently(put, f"{target}/{name}", "cannot be sent")

    if missing:
        amount = sum(sizes[name] for name in missing) / 2**30
        log(f"sending {len(missing)} of {len(sizes)} files of {path.name}, {amount:.3g} GiB, to {target}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(send, missing))
    if missing or MANIFEST not in there:
        send(MANIFEST)
    return target


def _sizes(store: Any, place: str) -> dict[str, int]:
    """{name: bytes} of all files below a place of a store, as they are now."""
    store.invalidate_cache()
    found = store.find(place, detail=True)
    return {name.removeprefix(place).lstrip("/"): int(about["size"]) for name, about in found.items()}
