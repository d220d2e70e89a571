"""What a project takes of the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from pipeline.housekeeping.items import size_below

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
