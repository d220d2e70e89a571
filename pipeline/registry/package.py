"""The model registry: reading versions of models, verifying and fetching their files, and the single writes.

A version is identified by the digest of its snapshot and by its default number of passes (the tags
`crescendo.model_digest` and `crescendo.default_passes`). Its files hold both and never change, so another default
makes another version. The registry is not trusted: files are verified against their manifest, and these, and the
code beside them, against the tags. MLflow does not check who else sets an alias, so aliases are read back after
they are set; who may set them when is up to journal.py.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts
from pipeline.errors import Busy, ConfigError, InputMissing, PipelineError, StorageError, one_line
from pipeline.registry import local, signing
from pipeline.registry.packaging import changed_file, find_snapshot, package_digest, packaged_default
from pipeline.tracking import store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
DIGEST_TAG = "crescendo.model_digest"
DEFAULT_TAG = "crescendo.default_passes"
PACKAGE_TAG = "crescendo.package_digest"  # of all files of a version
FROM_TAG = "crescendo.copied_from"  # store and address of the version that this is a copy of
NAME_TAG = "crescendo.model_name"  # of a logged model: the registered model that it is meant for
NO_FILES = "crescendo:/journal"  # source of an entry: of no scheme that a server would ask
BUSY_SECONDS = 10.0  # that threads of a failed download may go on
IDENTITY = (DIGEST_TAG, DEFAULT_TAG, PACKAGE_TAG)
REGISTRY_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with its tags in MLflow. created: ms since 1970, by the store's clock."""

    name: str
    number: str
    tags: Mapping[str, str] = field(default_factory=dict)
    created: int = 0

    @property
    def uri(self) -> str:
        """models:/NAME/NUMBER."""
        return f"models:/{self.name}/{self.number}"

    @property
    def digest(self) -> str | None:
        """Digest of the snapshot inside; None if the version was registered by other software."""
        return self.tags.get(DIGEST_TAG)

    @property
    def default_passes(self) -> int | None:
        """The fewest passes that passed the evaluation; None if none did."""
        tag = self.tags.get(DEFAULT_TAG, "")
        return int(tag) if tag.isascii() and tag.isdecimal() else None


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
    def connection(self) -> tuple[MlflowClient, str]:
        """MLflow's client, and the id of the experiment."""
        return store.connect(self.root)

    @property
    def _client(self) -> MlflowClient:
        return self.connection[0]

    @contextlib.contextmanager
    def failing(self, others: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Turn failures of the registry within the block, and exceptions of `others`, into StorageError.

        Raises InputMissing where a library that the registry needs is not installed."""
        where = store.public_uri(store.tracking_uri(self.root))
        try:
            yield
        except PipelineError:
            raise
        except ImportError as error:
            fix = "install what this address needs, or check MLFLOW_TRACKING_URI"
            raise InputMissing("E-INP-046", f"registry {where}", str(error), fix) from error
        except (*store.failures(), *others) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # by this machine's disk; run_main explains it
            reason = store.one_line_of(error)
            fix = "check MLFLOW_TRACKING_URI and that its server runs, then run it again"
            raise StorageError("E-IO-040", f"registry {where}", reason, fix) from error

    # --- Reading.

    def aliases(self, name: str) -> dict[str, str]:
        """{alias: version number} of the model `name`; empty if there is no such model, or no store yet."""
        if not store.store_exists(self.root):
            return {}
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                return local.read_aliases(self._database, name)
        with self.failing():
            aliases = _aliases(self._client, name) or {}
            return {alias: str(number) for alias, number in aliases.items()}

    def version(self, name: str, number: str) -> Version:
        """One version. Raises InputMissing if there is none."""
        found = next((version for version in self.versions(name) if version.number == number), None)
        if found is None:
            raise _no_model(f"models:/{name}/{number}")
        return found

    def digests(self) -> frozenset[str]:
        """Digests of the snapshots in all versions of all models."""
        with self.failing():
            page = self._client.search_model_versions()
            rows = [*page]
            while page.token:
                page = self._client.search_model_versions(page_token=page.token)
                rows += page
        return frozenset(row.tags[DIGEST_TAG] for row in rows if DIGEST_TAG in row.tags)

    def versions(self, name: str, tag: tuple[str, str] | None = None) -> list[Version]:
        """All versions, or those with a tag of this (key, value), the oldest first; none if there is no such
        model, or no store yet."""
        if not store.store_exists(self.root):
            return []
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                found = local.read_versions(self._database, name)
                versions = [Version(name, number, v.tags, v.created) for number, v in found.items()]
                return [each for each in versions if tag is None or each.tags.get(tag[0]) == tag[1]]
        query = f"name = '{name}'" + (f" and tags.`{tag[0]}` = '{tag[1]}'" if tag else "")
        with self.failing():
            rows = self._client.search_model_versions(query)
        versions = [Version(name, str(v.version), dict(v.tags), int(v.creation_timestamp)) for v in rows]
        return sorted(versions, key=lambda version: int(version.number))

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
        """Copy `version` into `folder`; path of its snapshot, verified.

        Raises StorageError if files are missing or changed, or if digests or default differ from the tags.
        """
        return self._verified(self._files(version, folder, copied=True), version)

    def verify(self, version: Version, scratch: Path, signed: bool = True) -> Path:
        """Check all files of `version`, where they lie if that is on this machine; their folder. Raises as `fetch`
        does; without `signed` asks for no signature."""
        folder = self._files(version, scratch)
        self._verified(folder, version, signed)
        return folder

    def file(self, version: Version, path: str, scratch: Path) -> Path | None:
        """One file of a version, in place or downloaded into `scratch`; None if it has none of that name."""
        stored = self.folder_of(version)
        if stored is not None:
            return stored / path if (stored / path).is_file() else None
        parent, _, name = path.rpartition("/")
        known = name in self.list_names(f"{version.uri}/{parent}")
        return self.download(f"{version.uri}/{path}", scratch) if known else None

    def list_names(self, uri: str) -> list[str]:
        """Names of the files and folders in a folder of a model."""
        with self.failing((Exception,)):  # of any store, to which a source may lead
            store.connect(self.root)
            from mlflow.artifacts import list_artifacts

            return [str(each.path).rpartition("/")[2] for each in list_artifacts(artifact_uri=uri)]

    def _verified(self, folder: Path, version: Version, signed: bool = True) -> Path:
        if signed:
            signing.require(folder, version.tags, version.uri)
        snapshot, fix = find_snapshot(folder), "delete that version and promote it again"
        if snapshot is None:
            raise StorageError("E-IO-042", version.uri, "does not hold a snapshot", fix)
        digest = str(artifacts.verify_directory(snapshot)["digest"])
        if version.digest != digest:
            problem = f"holds snapshot {digest[:12]}, its tag says {str(version.digest)[:12]}"
            raise StorageError("E-IO-042", version.uri, problem, fix)
        default = packaged_default(folder / "MLmodel")
        if default != version.default_passes:
            problem = f"has {default} as default passes, its tag says {version.default_passes}"
            raise StorageError("E-IO-042", version.uri, problem, fix)
        registered = version.tags.get(PACKAGE_TAG)
        if registered and registered != (digest := package_digest(folder)):
            file = changed_file(folder)
            what = f"has files {digest[:12]}, {registered[:12]} were registered"
            problem = f"{what}: code or settings were changed" + (f", {file}" if file else "")
            raise StorageError("E-IO-042", version.uri, problem, fix)
        return snapshot

    def _files(self, version: Version, folder: Path, copied: bool = False) -> Path:
        """The files of a version: on this machine in place, unless they are to be copied; else downloaded."""
        stored = self.folder_of(version)
        if stored is None:
            return self.download(version.uri, folder / f"{version.name}-{version.number}")
        return _copied(stored, folder / "model", version.uri) if copied else stored

    def folder_of(self, version: Version) -> Path | None:
        """The files of a version in a store on this machine."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                stored = local.read_version(self._database, version.name, version.number)
                return None if stored is None else stored.folder
        return None

    def download(self, uri: str, folder: Path) -> Path:
        """Download a model, or a file of it, into `folder`, which is removed if that fails."""
        folder.mkdir(parents=True, exist_ok=True)
        with self.failing((Exception,)):
            store.connect(self.root)  # downloads go to the tracking URI that this sets
            import mlflow

            try:
                return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
            except Exception:
                _remove_busy(folder)
                raise

    # --- Writing.

    def create_model(self, name: str, description: str) -> None:
        """Create a registered model, unless there is one."""
        from mlflow.exceptions import MlflowException

        with self.failing():
            if _aliases(self._client, name) is not None:
                return
            try:
                self._client.create_registered_model(name, description=description)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def create_entry(self, name: str, tags: Mapping[str, str]) -> None:
        """A version with tags alone."""
        with self.failing():
            self._client.create_model_version(name, NO_FILES, tags=dict(tags), await_creation_for=None)

    def delete(self, version: Version) -> None:
        """Delete a version; that there is none is no error."""
        from mlflow.exceptions import MlflowException

        with self.failing():
            try:
                self._client.delete_model_version(version.name, version.number)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version; its other tags stay."""
        with self.failing():
            for key, value in tags.items():
                self._client.set_model_version_tag(version.name, version.number, key, value)

    def set_alias(self, version: Version, alias: str) -> None:
        """Point `alias` to `version`. Raises Busy if another process has moved it when it is read back."""
        with self.failing():
            if self.aliases(version.name).get(alias) != version.number:
                self._client.set_registered_model_alias(version.name, alias, version.number)
        number = self.aliases(version.name).get(alias)
        if number != version.number:
            problem = f"points to version {number} after it was set to {version.number}"
            fix = "another promotion is running: run this one again when it has finished"
            raise Busy("E-BUSY-040", f"models:/{version.name}@{alias}", problem, fix)


def _copied(stored: Path, target: Path, uri: str) -> Path:
    """A copy of a stored model. Raises StorageError where something in it cannot be copied, such as a pipe."""
    try:
        return Path(shutil.copytree(stored, target, ignore_dangling_symlinks=True))
    except shutil.Error as error:
        path, _, reason = error.args[0][0]
        fix = "delete that version and promote it again"
        raise StorageError("E-IO-049", uri, f"{path} cannot be read: {reason}", fix) from error


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


def _remove_busy(folder: Path) -> None:
    """Remove a folder into which threads of a download that has failed may write for a moment more, so that whoever
    made it as a temporary one could not remove it."""
    end = time.monotonic() + BUSY_SECONDS
    while folder.exists() and time.monotonic() < end:
        try:
            shutil.rmtree(folder)
        except OSError:
            time.sleep(0.05)
