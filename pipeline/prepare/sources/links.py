"""Which links of a folder are followed: those to the folder itself, to DVC's cache, and below `data.link_roots`.

Any other could lead to files that nobody meant to read.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import BadData

OUTSIDE = "E-IMG-014"
FEW = 3  # folders that are named one by one
MAX_COUNTED = 100_000  # files behind a link that are counted


def link_roots(root: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The real folders that `data.link_roots` and DVC's configuration below `root` name."""
    return tuple(Path(os.path.realpath(root / name)) for name in (*names, *_dvc_caches(root / ".dvc")))


def _dvc_caches(dvc: Path) -> list[str]:
    """`cache.dir` of a DVC repository, as `dvc cache dir` sets it."""
    caches = [str(dvc / "cache")]
    for name in ("config", "config.local"):
        config = configparser.ConfigParser(interpolation=None)
        try:
            config.read(dvc / name, "utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # DVC itself will complain.
        if place := config.get("cache", "dir", fallback=""):
            caches.append(str(dvc / place))
    return caches


class Links:
    """Resolves names of one folder."""

    def __init__(self, folder: Path, roots: Sequence[Path]) -> None:
        self._folder = folder
        self._roots = roots

    def target(self, name: str) -> Path | None:
        """The real path of a file or folder; None if it is outside of all that may be read."""
        real = Path(os.path.realpath(self._folder / name))
        roots = (Path(os.path.realpath(self._folder)), *self._roots)
        return real if any(real.is_relative_to(root) for root in roots) else None

    def flaw(self, name: str, where: str) -> BadData:
        """Why a link that leads outside cannot be used."""
        real = Path(os.path.realpath(self._folder / name))
        what = f"a folder of {_count(real)} files, {real}" if real.is_dir() else str(real)
        problem = f"is a link to {what}, which is outside of this folder"
        return BadData(OUTSIDE, where, problem, roots_in_words([str(real)]))


def roots_in_words(targets: Sequence[str]) -> str:
    """The line to add so that links to these real paths are followed."""
    folders = sorted({path if os.path.isdir(path) else os.path.dirname(path) for path in targets})
    few = folders if len(folders) <= FEW else [os.path.commonpath(folders)]
    return (
        f"write data.link_roots: [{', '.join(few)}] in params.yaml, or copy what they hold" if folders else ""
    )


def _count(folder: Path) -> str:
    count = 0
    for _, _, names in os.walk(folder):
        count += len(names)
        if count > MAX_COUNTED:
            return f"more than {MAX_COUNTED}"
    return str(count)
