"""Where the project lies, and what of it git or DVC keeps."""

import subprocess
from pathlib import Path

import pytest

from pipeline import project


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    """A project with a sub-folder and a folder of images."""
    for name in ("stages", "notes/old", "data/raw", "data/mine"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", "data/README.md"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_the_root_is_found_from_a_sub_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "notes/a.zip").write_text("")
    monkeypatch.chdir(root / "notes/old")
    assert project.find_root() == root
    assert project.from_root("../a.zip", root) == "notes/a.zip"
    assert project.from_root("models/core", root) == "models/core"
    assert project.locate("models/core", root) == "../../models/core"
    assert project.locate("../a.zip", root) == "../a.zip"
    monkeypatch.chdir("/")
    assert project.find_root() == Path("/")


def test_an_experiment_in_a_folder_of_its_own_shares_what_the_project_keeps(root: Path) -> None:
    assert project.home_of(root / ".dvc/tmp/exps/standalone/tmp1") == root
    assert project.home_of(root) == root


def test_what_neither_git_nor_dvc_keeps_is_untracked(root: Path) -> None:
    assert project.is_tracked("data/raw", root), "there is nothing that could keep it"
    subprocess.run("git init -q && git add data/README.md", shell=True, cwd=root, check=True)
    (root / "data/mine.dvc").write_text("")
    tracked = {path: project.is_tracked(path, root) for path in ("data/README.md", "data/mine/a", "data/raw")}
    assert tracked == {"data/README.md": True, "data/mine/a": True, "data/raw": False}
    assert project.is_tracked("s3://bucket", root) and project.is_tracked("/elsewhere", root)
