"""A registry in a SQLite file is read without mlflow, with MLflow's own answers."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli import main
from pipeline.errors import InputMissing, StorageError
from pipeline.registry import local
from pipeline.registry.package import Registry
from pipeline.tracking import store

NAME = "crescendo"


def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where MLflow is asked."""

    def refuse(_: Path) -> None:
        raise AssertionError("the registry was read through mlflow")

    monkeypatch.setattr(store, "connect", refuse)


def through_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as from a server."""
    monkeypatch.setattr(local, "database_of", lambda _: None)


def test_aliases_versions_and_files_are_those_that_mlflow_reads(
    root: Path, remake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main.run(["promote"])
    digest = remake(seed=1)
    main.run(["promote"])
    answers = []
    for way in (through_mlflow, without_mlflow):
        with monkeypatch.context() as patch:
            way(patch)
            registry = Registry(root)
            version = registry.resolve(f"models:/{NAME}@champion")
            snapshot = registry.fetch(version, root / way.__name__)
            answers.append((registry.aliases(NAME), registry.version(NAME, "1"), version))
            assert artifacts.directory_digest(snapshot) == version.digest == digest
    assert answers[0] == answers[1]


def test_a_registered_model_draws_images_without_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main.run(["promote"])
    without_mlflow(monkeypatch)
    assert main.run(["generate", "cat", "--num", "1"]) == 0


def test_a_deleted_version_and_an_unknown_model_are_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main.run(["promote"])
    store.connect(root)[0].delete_model_version(NAME, "1")
    without_mlflow(monkeypatch)
    for uri in (f"models:/{NAME}/1", f"models:/{NAME}@champion", "models:/other/1"):
        with pytest.raises(InputMissing, match="there is no such model"):
            Registry(root).resolve(uri)


@pytest.mark.parametrize("content", [None, b"", b"not a database" * 100])
def test_a_file_that_is_not_a_store_is_left_to_mlflow(root: Path, content: bytes | None) -> None:
    if content is not None:
        (root / "mlflow.db").write_bytes(content)
    if content:
        with pytest.raises(StorageError, match="E-IO-040"):
            Registry(root).aliases(NAME)
    else:
        assert Registry(root).aliases(NAME) == {}


def test_files_that_are_elsewhere_are_left_to_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main.run(["promote"])
    with sqlite3.connect(root / "mlflow.db") as connection:
        connection.execute("UPDATE model_versions SET storage_location = 'file:///nowhere'")
    version = Registry(root).resolve(f"models:/{NAME}/1")
    without_mlflow(monkeypatch)
    with pytest.raises(StorageError, match="through mlflow"):
        Registry(root).fetch(version, root / "copy")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "postgresql://host/db"])
def test_a_server_has_no_local_file(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.database_of(uri) is None
    assert local.database_of("sqlite:////tmp/mlflow.db") == Path("/tmp/mlflow.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    assert local.database_of("sqlite:////tmp/mlflow.db") is None


def test_a_path_with_special_characters_is_read(root: Path, tmp_path: Path) -> None:
    main.run(["promote"])
    database = tmp_path / "a b#c?d%20.db"
    (root / "mlflow.db").rename(database)
    assert local.read_aliases(database, NAME) == {"candidate": "1", "champion": "1"}
    version = local.read_version(database, NAME, "1")
    assert version is not None and version.folder is not None and (version.folder / "MLmodel").is_file()
