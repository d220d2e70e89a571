"""What a project takes of the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("data", "models", "reports", "mlartifacts", ".dvc/cache")


class Disk(NamedTuple):
    """free: bytes left on the disk of the project. used: {folder: bytes}, of those that are there."""

    free: int
    used: dict[str, int]


def disk_of(root: Path, runs: Path) -> Disk:
    """Free space, and what the folders of a project and of its runs take."""
    folders = {"runs": runs, **{name: root / name for name in FOLDERS}}
    used = {name: size_below(path) for name, path in folders.items() if path.is_dir()}
    return Disk(shutil.disk_usage(root).free, used)


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
