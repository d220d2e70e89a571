"""A project folder that was renamed or copied: its registry works, and the old place is left alone."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.registry.package import Registry
from pipeline.tracking import relocation, store

NAME = "crescendo"


@pytest.fixture
def old(root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a champion, in a folder that may be renamed."""
    folder = tmp_path_factory.mktemp("projects") / "old place"
    shutil.copytree(root, folder)
    monkeypatch.chdir(folder)
    assert main.run(["promote"]) == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it, and here the process lives on
    return folder


def forget(project: Path) -> None:
    """Make the store that of an older version, whose experiment is not marked."""
    with sqlite3.connect(project / store.STORE) as connection:
        assert (
            connection.execute("DELETE FROM experiment_tags WHERE key = ?", (relocation.MARK,)).rowcount == 1
        )


def champion_is_readable(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert main.run(["generate", "smile", "--out", "out.png"]) == 0
    assert main.run(["promote"]) == 0


@pytest.mark.parametrize("marked", [True, False])
def test_a_renamed_project_works_and_writes_nothing_to_the_old_place(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], marked: bool
) -> None:
    if not marked:
        forget(old)
    new = old.rename(old.parent / "new")
    capsys.readouterr()
    champion_is_readable(new, monkeypatch)
    assert capsys.readouterr().err.count("artifacts are taken from this folder now") == 1
    client, experiment = store.connect(new)
    run = client.create_run(experiment)
    assert str(run.info.artifact_uri).startswith((new / "mlartifacts").as_uri())
    assert not old.exists()


def test_a_copy_is_a_project_of_its_own(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(old, old.parent / "copy"))
    before = sorted(old.rglob("*"))
    champion_is_readable(copy, monkeypatch)
    client, experiment = store.connect(copy)
    artifact = copy / "note.txt"
    artifact.write_text("new")
    client.log_artifact(client.create_run(experiment).info.run_id, str(artifact))
    assert sorted(old.rglob("*")) == before
    assert relocation.relocate(old / store.STORE) == []


def test_a_store_of_an_older_version_is_marked_when_it_is_next_used(old: Path) -> None:
    forget(old)
    client, experiment = store.connect(old)
    assert client.get_experiment(experiment).tags[relocation.MARK] == relocation.BESIDE


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(old: Path, tmp_path: Path) -> None:
    forget(old)
    elsewhere = tmp_path / "disk" / "mlartifacts"
    elsewhere.parent.mkdir()
    shutil.move(old / "mlartifacts", elsewhere)
    (old / "mlartifacts").mkdir()
    with sqlite3.connect(old / store.STORE) as connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", (elsewhere.as_uri(),))
    assert relocation.relocate(old / store.STORE) == []


def test_a_store_that_cannot_be_updated_is_read_all_the_same(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> list[str]:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    new = old.rename(old.parent / "new")
    monkeypatch.setattr(relocation, "relocate", refuse)
    monkeypatch.chdir(new)
    version = Registry(new).resolve(f"models:/{NAME}@champion")
    assert Registry(new).fetch(version, new / "fetched").is_dir()
    assert "cannot be updated" in capsys.readouterr().err


def test_what_is_no_store_of_mlflow_is_left_to_mlflow(tmp_path: Path) -> None:
    assert relocation.relocate(tmp_path / "mlflow.db") == []
    (tmp_path / "mlflow.db").write_text("not a database")
    assert relocation.relocate(tmp_path / "mlflow.db") == []
