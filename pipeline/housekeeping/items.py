"""What may be removed: a file or folder, its kind, and the lock under which that is safe. And removing it.

A folder gets a temporary name first, so that a reader sees all of it or nothing; what a process leaves that is
killed before it is gone has the name of a leftover (leftovers.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import Busy


@dataclass(frozen=True)
class Item:
    """kind: in the plural. size: bytes on the disk. leases: locks of stages that might use it. aside: the folder in
    which it gets its temporary name (default: its own)."""

    kind: str
    path: Path
    size: int
    leases: tuple[Path, ...] = ()
    aside: Path | None = None


def make_item(kind: str, path: Path, *leases: Path, aside: Path | None = None) -> Item:
    """An item, with its size."""
    size = size_below(path) if path.is_dir() else 512 * path.lstat().st_blocks
    return Item(kind, path, size, leases, aside)


def is_own(path: Path) -> bool:
    """Whether a file or folder is this user's; on a shared disk there are those of others."""
    return path.lstat().st_uid == os.getuid()


def plain_folders(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """Folders in a folder, in order; links are not followed."""
    found = folder.glob(pattern) if folder.is_dir() and not folder.is_symlink() else ()
    return (path for path in sorted(found) if path.is_dir() and not path.is_symlink())


def remove(item: Item) -> bool:
    """Remove an item; False, and nothing is changed, where a stage has begun to use it."""
    if not os.path.lexists(item.path):
        return False
    aside = (item.aside or item.path.parent) / f"{item.path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with contextlib.ExitStack() as held:
            for lease in filter(Path.is_file, item.leases):
                held.enter_context(artifacts.lease(lease))
            os.rename(item.path, aside)
    except Busy:
        return False
    artifacts.remove(aside)
    return True


def size_below(folder: Path) -> int:
    """Bytes on disk of the files below a folder. A file with several names there counts once; links are not
    followed, and what vanishes meanwhile does not count."""
    seen: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            seen[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(seen.values())


def in_words(size: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
