"""Where runs are stored."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.tracking import runs, store


def test_the_store_is_a_file_of_the_repository_unless_a_server_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert runs.find_run_by_output("models/core", "abc", tmp_path) is None
    assert not (tmp_path / "mlflow.db").exists()
    for root in (tmp_path, tmp_path / ".dvc/tmp/exps/standalone/one"):
        assert store.server_name(root) == "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert store.server_name(tmp_path) == "http://host:5000"
    assert store.tracking_uri(tmp_path) == "http://host:5000"
    assert store.database_of("http://host:5000") is None
    assert store.public_uri("http://me:pw@host:5000/x") == "http://host:5000/x"


def test_an_address_that_is_none_is_refused_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@[")
    with pytest.raises(
        ConfigError, match="^E-CFG-063 MLFLOW_TRACKING_URI: is no address. Fix: write one such as"
    ):
        store.tracking_uri(tmp_path)


@pytest.mark.parametrize("content", [b"no database", None])
def test_a_file_that_is_no_database_is_refused_at_once(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    file.mkdir() if content is None else file.write_bytes(content * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    with pytest.raises(sqlite3.DatabaseError):
        store.connect(tmp_path)


def test_a_store_whose_making_is_killed_is_not_there_and_is_made_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.quiet_mlflow()
    import mlflow

    class Killed(BaseException):
        pass

    def half(uri: str) -> Any:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half of the tables")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "MlflowClient", half)
        with pytest.raises(Killed):
            store.connect(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.new"]
    store.connect(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
