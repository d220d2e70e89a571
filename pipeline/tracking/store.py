"""The MLflow store: where it is, and how to reach it quietly."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


EXPERIMENT = "crescendo"
STORE = "mlflow.db"  # in the repository root, where no server is named


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` if set, else a SQLite file in the repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / STORE}"


def store_exists(root: Path) -> bool:
    """False where nothing can have been tracked yet: no server is named and the default file is missing."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (root / STORE).is_file()


def public_uri(uri: str) -> str:
    """`uri` without user name and password, for messages."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def artifact_location(uri: str) -> str | None:
    """Folder URI for a new experiment's artifacts: beside a SQLite file; a server chooses its own (None)."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def quiet_mlflow(timeout: int = 10) -> None:
    """Import mlflow so that it prints nothing, sends no telemetry and gives up on a dead server in `timeout` s."""
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
    import mlflow  # noqa: F401  (its import sets up logging; the levels below must come after)

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(root: Path, timeout: int = 10) -> tuple[MlflowClient, str]:
    """A client for `tracking_uri(root)` and the experiment's id; makes the database and the experiment.

    The experiment is `MLFLOW_EXPERIMENT_NAME`, else `crescendo`. Raises what MLflow raises (`failures()`).
    """
    quiet_mlflow(timeout)
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(root)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client, client.create_experiment(name, artifact_location=artifact_location(uri))
        except MlflowException:  # another process made it first; anything else shows again here
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return client, str(experiment.experiment_id)


def failures() -> tuple[type[Exception], ...]:
    """What a missing, broken or full tracking store raises; bugs of ours raise something else."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def one_line_of(error: Exception, limit: int = 160) -> str:
    """What a tracking server said, short and without passwords."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"//[^/@\s]+@", "//", text)  # no passwords of a URI
    return text if len(text) <= limit else text[: limit - 3] + "..."
