"""Where runs are stored."""

from pathlib import Path
from typing import Any

import pytest

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
