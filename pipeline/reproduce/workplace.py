"""The folder in which a version is made again: in the system's folder for temporary files, outside of the
project.

It is removed at the end. What is stopped or killed leaves it, and the same command goes on there; what nobody
goes on with for a day is a leftover (housekeeping).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import AccessError
from pipeline.reproduce import worktree

PREFIX = "crescendo-reproduce-"
LEASE, READY = "lease", "ready"


@dataclass(frozen=True)
class Workplace:
    """folder: of everything. root: of the user's project."""

    folder: Path
    root: Path

    @property
    def checkout(self) -> Path:
        """The work tree."""
        return self.folder / "tree"

    @property
    def version(self) -> Path:
        """The version's files."""
        return self.folder / "version"

    @property
    def inputs(self) -> Path:
        """Models that are fetched from the registry."""
        return self.folder / "inputs"

    @property
    def environment(self) -> Path:
        """A virtual environment, if one is made."""
        return self.folder / "environment"

    def begin(self) -> None:
        """Remove what is fetched again, and what a process left that was killed before stages ran."""
        shutil.rmtree(self.version, ignore_errors=True)
        shutil.rmtree(self.inputs, ignore_errors=True)
        if not (self.folder / READY).exists():
            worktree.remove(self.root, self.checkout)
            shutil.rmtree(self.checkout, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        worktree.remove(self.root, self.checkout)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def workplace(root: Path, key: str) -> Iterator[Workplace]:
    """The folder for `key`, removed at the end unless stages were running that can go on.

    Raises Busy where another process works there, AccessError where it is another user's."""
    place = Workplace(Path(tempfile.gettempdir(), f"{PREFIX}{key}").absolute(), root)
    place.folder.mkdir(mode=0o700, exist_ok=True)
    if place.folder.is_symlink() or place.folder.stat().st_uid != os.getuid():
        fix = "have it removed, or set TMPDIR to another folder"
        raise AccessError("E-ACC-160", str(place.folder), "is another user's", fix)
    with artifacts.lease(place.folder / LEASE):
        try:
            place.begin()
            yield place
        except BaseException:
            if not (place.folder / READY).exists():
                place.remove()
            raise
        place.remove()


def folders() -> list[Path]:
    """Folders of this kind on this machine, of this user."""
    found = Path(tempfile.gettempdir()).absolute().glob(f"{PREFIX}*")
    return sorted(path for path in found if not path.is_symlink() and path.stat().st_uid == os.getuid())
