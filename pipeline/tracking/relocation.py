"""A SQLite store that works wherever its folder is.

MLflow stores where artifacts lie as absolute addresses. In a folder that was renamed, moved, copied or mounted
elsewhere they lead to the old place, where new files would be written. So they are rewritten to the folder that the
database is in now, before anything reads or writes them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"  # beside the database
TIMEOUT = 10.0  # seconds to wait for a writer
MARK = "crescendo.artifacts"  # tag of an experiment whose artifacts lie beside the database, wherever that is
BESIDE = "beside the database"
COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def artifact_location(database: Path) -> str:
    """Address of the artifact folder beside a database."""
    return (database.resolve().parent / ARTIFACTS).as_uri()


def relocate(database: Path) -> list[str]:
    """Rewrite the addresses of artifacts that belong beside `database` and are said to be elsewhere; the former
    addresses. Nothing is changed where the database is missing or is not MLflow's.

    Artifacts belong beside the database where their experiment has the tag MARK, or, in an older store, where it
    says that they are in a folder ARTIFACTS which no longer exists while there is one here. Raises sqlite3.Error
    where the database cannot be written."""
    former = moved_from(database)
    if not former:
        return []
    here = artifact_location(database)
    with contextlib.closing(sqlite3.connect(database, timeout=TIMEOUT, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for location in former:
            _rewrite(connection, location, here)
        connection.execute("COMMIT")
    return former


def moved_from(database: Path) -> list[str]:
    """The addresses that `relocate` would rewrite."""
    if not database.is_file():
        return []
    here = artifact_location(database)
    return [location for location in _belonging(database) if location != here]


def _belonging(database: Path) -> list[str]:
    """Addresses of artifacts that belong beside the database."""
    query = (
        "SELECT DISTINCT artifact_location, EXISTS (SELECT 1 FROM experiment_tags AS t "
        "WHERE t.experiment_id = e.experiment_id AND t.key = ? AND t.value = ?) FROM experiments AS e"
    )
    try:
        with contextlib.closing(_open_read_only(database)) as connection:
            rows: Sequence[tuple[str, int]] = connection.execute(query, (MARK, BESIDE)).fetchall()
    except sqlite3.Error:
        return []  # other tables, or a damaged file, which MLflow explains
    return sorted({location for location, marked in rows if marked or _was_left(location, database)})


def _was_left(location: str, database: Path) -> bool:
    folder = folder_of(location)
    moved = folder is not None and folder.name == ARTIFACTS and not folder.exists()
    return moved and (database.parent / ARTIFACTS).is_dir()


def _rewrite(connection: sqlite3.Connection, former: str, here: str) -> None:
    for table, columns in COLUMNS.items():
        for column in columns:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (here, len(former) + 1, former, len(former) + 1, f"{former}/"),
            )


def find_folder(location: str | None, database: Path) -> Path | None:
    """The folder of an address in `database`, also where this cannot be rewritten after a move; None if there is no
    such folder on this machine."""
    here = artifact_location(database)
    for former in _belonging(database):
        if location is not None and location.startswith(f"{former}/"):
            location = here + location.removeprefix(former)
            break
    folder = folder_of(location)
    return folder if folder is not None and folder.is_dir() else None


def folder_of(location: str | None) -> Path | None:
    """The path of a `file:` address on this machine; None for others."""
    parts = urlsplit(location or "")
    return Path(unquote(parts.path)) if parts.scheme == "file" and not parts.netloc else None


def _open_read_only(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", timeout=TIMEOUT, uri=True)
