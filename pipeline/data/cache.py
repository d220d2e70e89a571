"""A folder of copies, bounded in bytes: the least recently used give way to new ones.

Any number of processes may share it. Each file is fetched by one of them, while the others wait for it, and gets
its name when it is whole; the part that a killed process leaves is removed by others. fsspec's own caches of whole
files (`filecache`, `simplecache`) are not bounded, and take the part that a killed process left for the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

PART = ".part"  # NAME.SIZE.part is on its way: it counts with the size that it will have
LOCK = "cache.lock"


class Cache:
    """Files below `folder`, of `max_bytes` in all, unless more are on their way at once.

    The `keep` newest are never removed, so that what was asked for a moment ago is there. Others may be gone at any
    time, except for those who have opened them."""

    def __init__(self, folder: Path, max_bytes: int, keep: int = 0) -> None:
        self.folder, self.max_bytes, self.keep = folder, max_bytes, keep

    def path(self, name: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """A file of `size` bytes, which counts as used now. Where it is not there, `fetch(path)` writes it."""
        target = self.folder / name
        part = target.with_name(f"{target.name}.{size}{PART}")
        while not _touch(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file, part):  # Another process has fetched or removed it meanwhile.
                    continue
                try:
                    if not target.exists():
                        self.make_room()
                        fetch(part)
                        with self._lock():
                            os.replace(part, target)
                finally:
                    if _is_at(file, part):
                        part.unlink()
        return target

    def make_room(self) -> None:
        """Remove the files that were not used for longest, so that the others and those on their way fit."""
        with self._lock():
            parts, copies = self._listed()
            total = sum(int(path.stem.rpartition(".")[2]) for path in parts if not _removed_if_dead(path))
            for i, (_, size, path) in enumerate(sorted(copies, reverse=True)):
                total += size
                if total > self.max_bytes and i >= self.keep:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Nobody else makes room meanwhile, and no part becomes a file."""
        with open(self.folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _listed(self) -> tuple[list[Path], list[tuple[float, int, Path]]]:
        """Parts; and files, with the time of their last use and their size."""
        parts, copies = [], []
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names if name != LOCK):
                if path.suffix == PART:
                    parts.append(path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_mtime, status.st_size, path))
        return parts, copies


def _touch(path: Path) -> bool:
    """Mark a file as used now; whether there is one."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _removed_if_dead(part: Path) -> bool:
    """Whether a part is gone now, as no living process fetches it."""
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True
