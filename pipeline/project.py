"""Where the project lies, as seen from a sub-folder or from DVC's folder of an experiment.

Standard library only.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT_HOLDS = ("params.yaml", "dvc.yaml", "stages")
EXPERIMENTS = (".dvc", "tmp", "exps")  # DVC's own folders for `dvc exp run --temp` and `--queue`


def find_root(start: Path | None = None) -> Path:
    """The project that `start` (default: the working directory) lies in; `start` itself if it lies in none."""
    start = (start or Path.cwd()).resolve()
    folders = (start, *start.parents)
    return next((each for each in folders if all((each / name).exists() for name in ROOT_HOLDS)), start)


def from_root(typed: str, root: Path) -> str:
    """A path that was typed in a sub-folder, as seen from the root; what names nothing there, unchanged."""
    here = Path.cwd()
    return typed if here == root or not (here / typed).exists() else os.path.relpath(here / typed, root)


def locate(typed: str, root: Path) -> str:
    """A path that was typed, as seen from the working directory: what lies there, else what lies below the root."""
    return typed if Path(typed).exists() else os.path.relpath(root / typed)


def folder_name(folder: str | Path, root: Path) -> str:
    """A folder as its images name it: from the root, or where it lies elsewhere, its own name alone."""
    path = Path(folder).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def is_tracked(path: str, root: Path) -> bool:
    """Whether git or DVC keeps a path below the root; True of what they could not keep."""
    place = Path(os.path.normpath(root / path))
    if "://" in path or not place.is_relative_to(root) or not (root / ".git").exists():
        return True
    above = [each for each in (place, *place.parents) if each.is_relative_to(root) and each != root]
    if any(each.with_name(f"{each.name}.dvc").is_file() for each in above):
        return True
    command = ["git", "-C", str(root), "ls-files", "--", str(place)]
    return bool(subprocess.run(command, capture_output=True, check=False, timeout=10).stdout)


def home_of(root: Path) -> Path:
    """`root`; or, where that is a folder in which DVC runs an experiment, and which it removes afterwards, the
    project that the experiment belongs to: it keeps runs and the tracking store."""
    parts = root.resolve().parts
    starts = (i for i in range(len(parts)) if parts[i : i + len(EXPERIMENTS)] == EXPERIMENTS)
    return next((Path(*parts[:i]) for i in starts), root.resolve())
