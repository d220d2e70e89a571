"""The checker of a race: it looks 20 times a second whether the champion is one that verifies.

A look is cheap, so that it can be taken that often: one query of the database says which version the champion is
and what its digests are, as of one moment, and all bytes of its files are read and compared with them. Every second
the champion is resolved and verified as users do it, through the server where there is one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy

from benchmarks.chaos.stores import Store
from pipeline import artifacts
from pipeline.errors import PipelineError, StorageError
from pipeline.registry import champions
from pipeline.registry.package import CHAMPION, DIGEST_TAG, PACKAGE_TAG, Registry
from pipeline.registry.packaging import find_snapshot, package_digest

RATE = 20.0  # looks a second
PERIOD = 1.0  # seconds between looks as users do
QUERY = """
SELECT version.version, version.source, tag.key, tag.value
FROM registered_model_aliases AS alias
JOIN model_versions AS version ON version.name = alias.name AND version.version = alias.version
JOIN model_version_tags AS tag ON tag.name = version.name AND tag.version = version.version
WHERE alias.name = :name AND alias.alias = :alias
"""


@dataclass(frozen=True)
class Looks:
    """What the checker saw. as_users: how many looks were those of users. broken: a line for each champion that did
    not verify."""

    count: int
    as_users: int
    seconds: float
    broken: list[str]


def look(root: Path, name: str, store: Store, stop: Any) -> Looks:
    """Look at the champion of the model `name`, RATE times a second if that can be done, until `stop`."""
    registry, broken, count, as_users = Registry(root), [], 0, 0
    quick = QuickLook(store.database, store.models) if store.database and store.models else None
    started = due = time.monotonic()
    seen = False
    while not stop.wait(max(0.0, started + count / RATE - time.monotonic())):
        try:
            if quick is not None:
                there = quick.look(name)
                if seen and not there:
                    broken.append("there is no champion")
                seen |= there
            if (quick is None or seen) and time.monotonic() >= due:
                seen = look_as_user(registry, name, seen)
                as_users, due = as_users + 1, time.monotonic() + PERIOD
        except PipelineError as error:
            broken.append(str(error))
        count += 1
    return Looks(count, as_users, time.monotonic() - started, broken)


def look_as_user(registry: Registry, name: str, seen: bool) -> bool:
    """Whether there is a champion, which is verified; one that was seen has to be there."""
    if not seen and CHAMPION not in registry.aliases(name):
        return False
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        registry.verify(champions.resolve(registry, f"models:/{name}@{CHAMPION}"), Path(scratch))
    return True


class QuickLook:
    """Looks at a database, and at the files of its models in a folder."""

    def __init__(self, database: str, models: Path) -> None:
        engine = sqlalchemy.create_engine(database, isolation_level="AUTOCOMMIT")
        self._connection, self._models = engine.connect(), models

    def look(self, name: str) -> bool:
        """Whether there is a champion. Raises StorageError where its bytes are not those of its digests."""
        values = {"name": name, "alias": CHAMPION}
        rows = self._connection.execute(sqlalchemy.text(QUERY), values).all()
        if not rows:
            return False
        number, source, *_ = rows[0]
        folder = self._models / str(source).rpartition("/")[2] / "artifacts"
        require_bytes(folder, {key: value for _, _, key, value in rows}, f"models:/{name}/{number}")
        return True


def require_bytes(folder: Path, tags: Mapping[str, str], address: str) -> None:
    """Raise StorageError unless the files in `folder` are those of the digests in `tags`."""
    snapshot = find_snapshot(folder)
    digest = None if snapshot is None else artifacts.directory_digest(snapshot)
    found = {DIGEST_TAG: digest, PACKAGE_TAG: package_digest(folder)}
    for tag, value in found.items():
        if value != tags.get(tag):
            problem = f"{tag} is {str(value)[:12]} by its bytes, {str(tags.get(tag))[:12]} by its tag"
            raise StorageError("E-IO-042", address, problem, "restore its files")
