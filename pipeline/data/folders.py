"""Where a prepared data set lies: in a folder of this machine, or behind a URL with a cache in between.

`push` copies an artifact folder to URL/DIGEST. Its files are fetched from there when they are first needed, and
each is compared with the manifest's sha256, after it was fetched and when a process first meets it in the cache.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline import artifacts
from pipeline.artifacts import MANIFEST
from pipeline.data.cache import Cache
from pipeline.data.store import open_store, store_error
from pipeline.errors import Busy, ConfigError, InputMissing, PipelineError, StorageError

T = TypeVar("T")
Identity = tuple[int, int, int]  # of a file: device, inode, bytes
WAITS = (1.0, 3.0, 10.0, 30.0, 60.0)  # seconds before each further attempt at a store that is away
AT_ONCE = 4  # files that are sent, or fetched ahead, at the same time
LOOKS = 16  # coming batches that are looked at for each that is trained on, at most
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


class LocalFolder:
    """A folder of this machine. Its files are not verified, as whoever starts a stage has done that."""

    room = 0

    def __init__(self, path: Path) -> None:
        if not (path / MANIFEST).is_file():
            raise InputMissing("E-INP-010", str(path), "no prepared data set here", "run `dvc repro prepare`")
        self.where, self._path = str(path), path
        self.manifest = artifacts.read_manifest(path)
        self._opened: dict[str, Any] = {}

    def open(self, names: Sequence[str], read: Callable[[Path], T]) -> T:
        """See `Folder.open`."""
        if names[0] not in self._opened:
            self._opened[names[0]] = read(self._path)
        opened: T = self._opened[names[0]]
        return opened

    def expect(self, names: Iterable[str]) -> None:
        """See `Folder.expect`."""


class FarFolder:
    """What `push` returned.

    Raises InputMissing or AccessError, Busy where its store is away for long, and ConfigError where the cache is
    too small for one of the files."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.where, self._cache, self._digest = url, cache, url.rpartition("/")[2]
        self._store, self._path = open_store(url)
        content = _patiently(lambda: self._store.cat_file(f"{self._path}/{MANIFEST}"), f"{url}/{MANIFEST}")
        self.manifest = artifacts.parse_manifest(content, f"{url}/{MANIFEST}")
        if self.manifest["digest"] != self._digest:
            raise _damaged(f"{url}/{MANIFEST}")
        size, name = max((about["size"], name) for name, about in self.manifest["files"].items())
        if size > cache.max_bytes:
            problem = f"has {size / 2**30:.3g} GiB, more than the cache may hold"
            raise ConfigError("E-CFG-061", f"{url}/{name}", problem, "raise cache_gib of the profile")
        self._met: dict[str, Identity] = {}
        self._opened: dict[str, tuple[list[Identity], Any]] = {}
        self._expected: set[str] = set()
        self._slots = threading.Semaphore(AT_ONCE)

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
            if name in self._expected:
                continue
            self._expected.add(name)
            threading.Thread(target=self._fetch_ahead, args=(name,), daemon=True).start()

    def _fetch_ahead(self, name: str) -> None:
        try:
            with self._slots:
                self.path(name)
        except (PipelineError, OSError):
            return  # Whoever opens the file meets the same, and tells.
        finally:
            self._expected.discard(name)

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
            _patiently(fetch, where)
            if _agrees(path, about):
                return
        raise _damaged(where)


def require_room(folder: Folder, size: int, num_images: int, shuffle_images: int) -> None:
    """Raise ConfigError where `num_images` images in files of `size` bytes do not fit into a cache, nor those of
    them that are shuffled together (0: all) with the next ones: nearly every image would have its file fetched."""
    if not folder.room:
        return
    most = num_images * folder.room // size
    if size <= 2 * folder.room or 0 < shuffle_images <= most:
        return
    problem = f"has {size / 2**30:.3g} GiB to read, {2 * folder.room / 2**30:.3g} fit into the cache"
    fix = (
        f"raise cache_gib of the profile, or set shuffle_images of the stage in params.yaml to {most} or less"
    )
    raise ConfigError("E-CFG-062", folder.where, problem, fix)


class LookAhead:
    """Has the files of coming batches fetched meanwhile: as many as there is room for, or those of one epoch."""

    def __init__(
        self, folder: Folder, files_at: Callable[[int], dict[str, int]], batch_size: int, epoch: int
    ) -> None:
        """`files_at(nimg)`: {name: bytes} of what the batch that starts at image `nimg` reads. `epoch`: images."""
        self._folder, self._files_at, self._batch_size, self._epoch = folder, files_at, batch_size, epoch
        self._next = 0  # nimg of the first batch that was not looked at
        self._sizes: dict[str, int] = {}  # of the files that were asked for
        self._needed: dict[str, int] = {}  # nimg of the last batch that reads each of them, so far

    def move_to(self, nimg: int) -> None:
        """Training is at the batch that starts at image `nimg`."""
        if not self._folder.room:
            return
        for name in [name for name, last in self._needed.items() if last < nimg]:
            del self._needed[name], self._sizes[name]
        self._next = max(self._next, nimg)
        for _ in range(LOOKS):
            if self._next > nimg + self._epoch or sum(self._sizes.values()) > self._folder.room:
                return
            sizes = self._files_at(self._next)
            self._folder.expect([name for name in sizes if name not in self._sizes])
            self._sizes |= sizes
            self._needed |= dict.fromkeys(sizes, self._next)
            self._next += self._batch_size


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size


def _agrees(path: Path, about: dict[str, Any]) -> bool:
    """Whether a file has the size and sha256 that a manifest says."""
    return path.stat().st_size == about["size"] and artifacts.sha256_file(path) == about["sha256"]


def _damaged(where: str) -> StorageError:
    fix = "remove it there and run the stage again, which sends it anew"
    return StorageError("E-IO-062", where, "differs from what was sent", fix)


def _patiently(work: Callable[[], T], where: str, failed: str = "cannot be fetched") -> T:
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
    there = _patiently(partial(_sizes, store, place), target, "cannot be listed")
    missing = [name for name, size in sizes.items() if there.get(name) != size]

    def send(name: str) -> None:
        put = partial(store.put_file, str(path / name), f"{place}/{name}")
        _patiently(put, f"{target}/{name}", "cannot be sent")

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
