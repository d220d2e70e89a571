"""A work tree of the user's repository at the commit of a version, with the version's changes and files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from pipeline.errors import InputMissing, StorageError
from pipeline.registry.provenance import FILES, PATCH

OWN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # which git sets for its hooks
NO_HOOKS = ("-c", "core.hooksPath=/dev/null")


def require_commit(root: Path, commit: str, uri: str) -> None:
    """Raise InputMissing unless there is git, and the repository at `root` has the commit of a version."""
    if shutil.which("git") is None:
        raise InputMissing("E-INP-162", "git", "is not on the path", "install it")
    if _git(root, "rev-parse", "--git-dir").returncode:
        raise InputMissing(
            "E-INP-163", str(root), "is no git repository", "run this in a clone of the project"
        )
    known = (
        re.fullmatch("[0-9a-f]{7,64}", commit)
        and not _git(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode
    )
    if not known:
        fix = "run `git fetch --all`, in a shallow clone `git fetch --unshallow`"
        raise InputMissing("E-INP-164", uri, f"its commit {commit[:12]} is not in this repository", fix)


def add(root: Path, commit: str, folder: Path, files: Path) -> Path:
    """Check the commit out to `folder`, unless that is done, and apply `files` (provenance.py); the folder of the
    project in there.

    Raises StorageError where git fails."""
    tree = folder / _git(root, "rev-parse", "--show-prefix").stdout.strip()
    if folder.exists():
        return tree
    added = _git(root, *NO_HOOKS, "worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)
    _require(added, f"worktree add of {commit[:12]}")
    if (files / PATCH).is_file():
        applied = _git(folder, "apply", "--whitespace=nowarn", str((files / PATCH).resolve()))
        _require(applied, f"apply {PATCH}")
    for name in FILES:
        if (files / name).is_file():
            shutil.copyfile(files / name, tree / name)
    return tree


def remove(root: Path, folder: Path) -> None:
    """Remove a work tree, if it is there, and what the repository knows of it."""
    if shutil.which("git") is not None:
        _git(root, "worktree", "remove", "--force", "--force", str(folder))


def records(root: Path) -> list[tuple[Path, Path]]:
    """(the repository's folder about it, its own folder) of each work tree that was added to the repository."""
    answer = (
        _git(root, "rev-parse", "--path-format=absolute", "--git-common-dir") if shutil.which("git") else None
    )
    if answer is None or answer.returncode:
        return []
    found = sorted(Path(answer.stdout.strip()).glob("worktrees/*/gitdir"))
    return [(path.parent, Path(path.read_text(encoding="utf-8").strip()).parent) for path in found]


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _require(answer: subprocess.CompletedProcess[str], what: str) -> None:
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or ["without a word"]
        fix = "mend what git names (its settings of line ends, a full disk), then run this again"
        raise StorageError("E-IO-160", "git", f"{what} failed: {said[-1]}", fix)
