"""Reading a registry that is a SQLite file without mlflow, whose import takes as long as that of torch.

The tables are those of MLflow 3. `Registry` asks MLflow wherever this raises sqlite3.Error (no such file, other
tables, a damaged file), so that creating a store, upgrading it and explaining its errors stay MLflow's own.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking import relocation, store

TIMEOUT = 10.0  # seconds to wait for a writer
NOT_DELETED = "current_stage != 'Deleted_Internal'"


@dataclass(frozen=True)
class LocalVersion:
    """A version of a registered model: its tags, and the folder of its files (None: not on this machine)."""

    tags: Mapping[str, str]
    folder: Path | None
    created: int  # ms since 1970


def database_of(uri: str) -> Path | None:
    """The file of the tracking URI `sqlite:///FILE`; None for others, or where the registry is elsewhere."""
    return None if os.environ.get("MLFLOW_REGISTRY_URI") else store.database_of(uri)


def read_aliases(database: Path, name: str) -> dict[str, str]:
    """{alias: version number} of the model `name`; empty if there is no such model. Raises sqlite3.Error."""
    query = "SELECT alias, version FROM registered_model_aliases WHERE name = ? AND workspace = 'default'"
    return {alias: str(version) for alias, version in _rows(database, query, name)}


def read_version(database: Path, name: str, number: str) -> LocalVersion | None:
    """One version of the model `name`; None if there is none. Raises sqlite3.Error."""
    where = "WHERE name = ? AND version = ? AND workspace = 'default'"
    query = f"SELECT storage_location, creation_time FROM model_versions {where} AND {NOT_DELETED}"
    rows = _rows(database, query, name, number)
    if not rows:
        return None
    tags = _rows(database, f"SELECT key, value FROM model_version_tags {where}", name, number)
    return LocalVersion(dict(tags), relocation.find_folder(rows[0][0], database), int(rows[0][1] or 0))


def read_versions(database: Path, name: str) -> dict[str, LocalVersion]:
    """All versions of the model `name` by number, the oldest first, without their folders. Raises sqlite3.Error."""
    where = "WHERE name = ? AND workspace = 'default'"
    query = f"SELECT version, creation_time FROM model_versions {where} AND {NOT_DELETED} ORDER BY version"
    tags: dict[int, dict[str, str]] = {}
    for number, key, value in _rows(
        database, f"SELECT version, key, value FROM model_version_tags {where}", name
    ):
        tags.setdefault(number, {})[key] = value
    return {
        str(number): LocalVersion(tags.get(number, {}), None, int(created or 0))
        for number, created in _rows(database, query, name)
    }


def _rows(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    address = f"{database.resolve().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, timeout=TIMEOUT, uri=True)) as connection:
        return connection.execute(query, values).fetchall()
