"""The model registry: finding versions of models, registering them, fetching them back.

A version is identified by the digest of its snapshot and by its default number of passes (the tags
`crescendo.model_digest` and `crescendo.default_passes`). Its files hold both and never change, so another default
makes another version. The registry is not trusted: fetched files are verified against their manifest, and both
against the tags. MLflow does not check who else sets an alias, so aliases are read back after they are set.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts
from pipeline.errors import Busy, ConfigError, InputMissing, StorageError, one_line
from pipeline.registry import local
from pipeline.registry.packaging import log_model, packaged_default
from pipeline.tracking import runs, store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
DIGEST_TAG = "crescendo.model_digest"
DEFAULT_TAG = "crescendo.default_passes"
REGISTRY_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with its tags in MLflow."""

    name: str
    number: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str | None:
        """Digest of the snapshot inside; None if the version was registered by other software."""
        return self.tags.get(DIGEST_TAG)

    @property
    def default_passes(self) -> int | None:
        """The fewest passes that passed the evaluation; None if none did."""
        tag = self.tags.get(DEFAULT_TAG, "")
        return int(tag) if tag.isdecimal() else None


class Registry:
    """The registry at `MLFLOW_TRACKING_URI`, by default the SQLite file of the repository at `root`.

    A SQLite file is read without mlflow (see local.py). Every method raises StorageError, in one line, when the
    registry fails.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._database = local.database_of(store.tracking_uri(root))
        if self._database is not None:
            store.relocate(self._database)

    @functools.cached_property
    def _connection(self) -> tuple[MlflowClient, str]:
        return store.connect(self.root)

    @property
    def _client(self) -> MlflowClient:
        return self._connection[0]

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        where = store.public_uri(store.tracking_uri(self.root))
        try:
            yield
        except store.failures() as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # by this machine's disk; run_main explains it
            reason = store.one_line_of(error)
            fix = "check MLFLOW_TRACKING_URI and that its server runs, then run it again"
            raise StorageError("E-IO-040", f"registry {where}", reason, fix) from error

    # --- Reading.

    def aliases(self, name: str) -> dict[str, str]:
        """{alias: version number} of the model `name`; empty if there is no such model."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                return local.read_aliases(self._database, name)
        with self._failing():
            aliases = _aliases(self._client, name) or {}
            return {alias: str(number) for alias, number in aliases.items()}

    def version(self, name: str, number: str) -> Version:
        """One version. Raises InputMissing if there is none."""
        tags = self._tags(name, number)
        if tags is None:
            raise _no_model(f"models:/{name}/{number}")
        return Version(name, number, tags)

    def versions(self, name: str) -> list[Version]:
        """All versions, the oldest first; none if there is no such model."""
        with self._failing():
            rows = self._client.search_model_versions(f"name = '{name}'")
        versions = [Version(name, str(row.version), dict(row.tags)) for row in rows]
        return sorted(versions, key=lambda version: int(version.number))

    def digests(self) -> frozenset[str]:
        """Digests of the snapshots in all versions of all models."""
        with self._failing():
            page = self._client.search_model_versions()
            rows = [*page]
            while page.token:
                page = self._client.search_model_versions(page_token=page.token)
                rows += page
        return frozenset(row.tags[DIGEST_TAG] for row in rows if DIGEST_TAG in row.tags)

    def _tags(self, name: str, number: str) -> dict[str, str] | None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                version = local.read_version(self._database, name, number)
                return None if version is None else dict(version.tags)
        with self._failing():
            versions = self._client.search_model_versions(f"name = '{name}'")
            return next((dict(each.tags) for each in versions if str(each.version) == number), None)

    def find(self, name: str, digest: str, default_passes: int | None) -> Version | None:
        """The oldest version whose snapshot has this digest, and which has this default."""
        with self._failing():
            if _aliases(self._client, name) is None:
                return None
            query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
            found = self._client.search_model_versions(query)
        versions = [Version(name, str(version.version), dict(version.tags)) for version in found]
        same = (version for version in versions if version.default_passes == default_passes)
        return min(same, key=lambda version: int(version.number), default=None)

    def resolve(self, uri: str) -> Version:
        """The version at `models:/NAME@ALIAS` or `models:/NAME/NUMBER`.

        Raises ConfigError for an address of another form, InputMissing if there is no such version.
        """
        match = REGISTRY_URI.fullmatch(uri)
        if match is None or "'" in uri:
            form = "write models:/NAME@champion, models:/NAME/3 or a folder"
            raise ConfigError("E-CFG-040", "model", f"{uri!r} is not the address of a model", form)
        number = match["version"] or self.aliases(match["name"]).get(match["alias"])
        if number is None:
            raise _no_model(uri)
        return self.version(match["name"], number)

    def fetch(self, version: Version, folder: Path) -> Path:
        """Download `version` into `folder`; path of its snapshot, verified.

        Raises StorageError if files are missing or changed, or if digest or default differ from the tags.
        """
        where, fix = f"models:/{version.name}/{version.number}", "delete that version and promote it again"
        with self._failing():
            copy = self._download(version, where, folder)
        snapshots = [path for path in copy.glob("artifacts/*") if path.is_dir()]
        if len(snapshots) != 1:
            raise StorageError("E-IO-042", where, "does not hold a snapshot", fix)
        digest = str(artifacts.verify_directory(snapshots[0])["digest"])
        if version.digest != digest:
            problem = f"holds snapshot {digest[:12]}, its tag says {str(version.digest)[:12]}"
            raise StorageError("E-IO-042", where, problem, fix)
        default = packaged_default(copy / "MLmodel")
        if default != version.default_passes:
            problem = f"has {default} as default passes, its tag says {version.default_passes}"
            raise StorageError("E-IO-042", where, problem, fix)
        return snapshots[0]

    def _download(self, version: Version, uri: str, folder: Path) -> Path:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                stored = local.read_version(self._database, version.name, version.number)
                if stored is not None and stored.folder is not None:
                    return Path(shutil.copytree(stored.folder, folder / "model"))
        store.connect(self.root)  # downloads go to the tracking URI that this sets
        import mlflow

        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))

    # --- Writing.

    def register(
        self,
        name: str,
        snapshot: Path,
        digest: str,
        tags: Mapping[str, str],
        default_passes: int | None = None,
    ) -> Version:
        """Package `snapshot`, whose digest is `digest`, and register it as a new version with these tags."""
        default = {} if default_passes is None else {DEFAULT_TAG: str(default_passes)}
        tags = {**tags, DIGEST_TAG: digest, **default}
        with self._failing():
            client, experiment = self._connection
            run, _ = runs.child_run(
                client, experiment, runs.this_pipeline(self.root), "promote", "promote", digest
            )
            model_id, uri = log_model(snapshot, run, tags, default_passes)
            client.set_terminated(run)
            if _aliases(client, name) is None:
                client.create_registered_model(name)
            version = client.create_model_version(name, uri, run, tags=dict(tags), model_id=model_id)
        return Version(name, str(version.version), tags)

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version; its other tags stay."""
        with self._failing():
            for key, value in tags.items():
                self._client.set_model_version_tag(version.name, version.number, key, value)

    def set_alias(self, version: Version, alias: str) -> None:
        """Point `alias` to `version`. Raises Busy if another process has moved it when it is read back."""
        with self._failing():
            if self.aliases(version.name).get(alias) != version.number:
                self._client.set_registered_model_alias(version.name, alias, version.number)
        number = self.aliases(version.name).get(alias)
        if number != version.number:
            problem = f"points to version {number} after it was set to {version.number}"
            fix = "another promotion is running: run this one again when it has finished"
            raise Busy("E-BUSY-040", f"models:/{version.name}@{alias}", problem, fix)


def _no_model(uri: str) -> InputMissing:
    return InputMissing("E-INP-040", one_line(uri), "there is no such model", "run `crescendo promote` first")


def _aliases(client: MlflowClient, name: str) -> dict[str, str] | None:
    """Aliases of a registered model; None if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
