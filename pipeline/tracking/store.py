"""The MLflow store: its address, and a client that prints nothing."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from pipeline.errors import ConfigError, one_line
from pipeline.project import home_of
from pipeline.tracking import relocation

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient


EXPERIMENT = "crescendo"
STORE = "mlflow.db"  # in the repository root, without a tracking server


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` if set, else a SQLite file in the repository root, which experiments share. Raises
    ConfigError, without the value, which may hold a password, where it is no address."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home_of(root) / STORE}"
    try:
        urlsplit(uri)
    except ValueError:
        fix = "write one such as http://HOST:5000, or leave it unset"
        raise ConfigError("E-CFG-063", "MLFLOW_TRACKING_URI", "is no address", fix) from None
    return uri


def store_exists(root: Path) -> bool:
    """False if nothing can have been tracked: no server is set and the default file does not exist."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (home_of(root) / STORE).is_file()


@contextlib.contextmanager
def other_store(uri: str) -> Iterator[None]:
    """Make `uri` the store of this process for the block, models included."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        os.environ.update(before)


def public_uri(uri: str) -> str:
    """`uri` without user name and password, for messages."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def database_of(uri: str) -> Path | None:
    """The file of the address `sqlite:///FILE`; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def quiet_mlflow(timeout: int = 10) -> None:
    """Import mlflow, without prints and telemetry; requests to a dead server fail after `timeout` seconds."""
    for key, value in {
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(key, value)
    import mlflow  # noqa: F401  (sets log levels, so those below must come after)

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(root: Path, timeout: int = 10) -> tuple[MlflowClient, str]:
    """A client for `tracking_uri(root)` and the experiment's id; creates the database and the experiment.

    The experiment is `MLFLOW_EXPERIMENT_NAME`, else `crescendo`. Raises the exceptions of MLflow (`failures()`).
    """
    quiet_mlflow(timeout)
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(root)
    mlflow.set_tracking_uri(uri)
    database = database_of(uri)
    if database is not None:
        relocate(database)
    with _alone(database):
        if database is not None and database.exists():
            _require_database(database)
        elif database is not None and database.parent.is_dir():
            _create_database(database)
        client = mlflow.MlflowClient(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client, _create_experiment(client, name, database)
        except MlflowException:  # probably created by another process meanwhile
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if database is not None and experiment.artifact_location == relocation.artifact_location(database):
        _mark(client, experiment)
    return client, str(experiment.experiment_id)


@contextlib.contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """Let one process at a time open a SQLite store: MLflow creates and upgrades its tables then, and two that do
    so at once break each other. The lock is on the folder, and adds no file to it."""
    if database is None or not database.parent.is_dir():
        yield
        return
    folder = os.open(database.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _require_database(file: Path) -> None:
    """Raise sqlite3.Error where SQLite cannot read a file: MLflow would try that again for 100 seconds."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()


def _create_database(database: Path) -> None:
    """A new SQLite store, made aside and renamed: MLflow makes its tables in steps, and could not open a store that
    was killed between two of them."""
    import mlflow

    new = database.with_name(f"{database.name}.new")
    for left in database.parent.glob(f"{new.name}*"):
        left.unlink()
    new.touch()  # OSError at once, where the folder takes no file
    mlflow.MlflowClient(f"sqlite:///{new}")
    os.replace(new, database)


def _create_experiment(client: MlflowClient, name: str, database: Path | None) -> str:
    """A new experiment, whose artifacts lie beside a SQLite file, or where the server says."""
    if database is None:
        return str(client.create_experiment(name))
    location, tags = relocation.artifact_location(database), {relocation.MARK: relocation.BESIDE}
    return str(client.create_experiment(name, artifact_location=location, tags=tags))


def _mark(client: MlflowClient, experiment: Experiment) -> None:
    """Mark an experiment of an older version, so that its folder may move."""
    if relocation.MARK not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, relocation.MARK, relocation.BESIDE)


def relocate(database: Path) -> None:
    """Let a SQLite store whose folder has moved find its artifacts, and say so on stderr. A store that cannot be
    written stays as it is."""
    try:
        former = relocation.relocate(database)
    except sqlite3.Error as error:
        print(
            f"warning: {database}: its folder was moved, and it cannot be updated: {error}", file=sys.stderr
        )
        return
    for location in former:
        print(
            f"{database.name}: artifacts are taken from this folder now, not from {location}", file=sys.stderr
        )


def failures() -> tuple[type[Exception], ...]:
    """Exceptions of a missing, broken or full tracking store; our own bugs raise others."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)


def server_name(root: Path) -> str:
    """The tracking server as messages and spools name it; the store of the repository itself, which experiments
    share, is only STORE, since its folder may move."""
    uri = tracking_uri(root)
    return STORE if database_of(uri) == home_of(root) / STORE else public_uri(uri)


def warn(message: str) -> None:
    """One line on stderr."""
    print(one_line(f"warning: tracking: {message}"), file=sys.stderr, flush=True)


def one_line_of(error: Exception, limit: int = 160) -> str:
    """The message of a tracking server on one line, shortened and without passwords."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"//[^/@\s]+@", "//", text)  # user and password of a URI
    return text if len(text) <= limit else text[: limit - 3] + "..."
