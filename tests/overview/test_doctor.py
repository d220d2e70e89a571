"""What the doctor finds in a project, and the cure that it names."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.launch import machine
from pipeline.overview import doctor
from pipeline.overview.doctor import Finding, examine
from pipeline.tracking import store
from pipeline.tracking.relocation import moved_from
from pipeline.tracking.stage_run import start_stage_run
from tests.checkout import write_params
from tests.conftest import ROOT

DEAD = 2**22 - 3  # no process has this number


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has tracked one run."""
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    write_params(root)
    (root / "dvc.yaml").write_text("stages: {}\n")
    shutil.copytree(ROOT / "infra", root / "infra")
    Repo.init(str(root), no_scm=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # which MLflow sets; it is restored
        with start_stage_run("toy", root, {}, {}, folder=root / "runs/toy/0123456789abcdef") as run:
            run.log_metrics({"loss": 1.0}, 8)
    return root


@pytest.fixture()
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy with nothing wrong; packages are another matter."""
    for name in ("MLFLOW_TRACKING_URI", "CRESCENDO_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CRESCENDO_COMPUTE", "process")
    monkeypatch.setenv("CRESCENDO_GIT_COMMIT", "0" * 40)
    monkeypatch.setattr(doctor, "LOW_DISK", 0)
    monkeypatch.setattr(machine, "pins", lambda lock: {})
    return Path(shutil.copytree(template, tmp_path / "project"))


def ill(root: Path) -> list[Finding]:
    return [finding for finding in examine(root) if finding.fix]


def conflict(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dvc.lock").write_text("schema: '2.0'\n<<<<<<< HEAD\nstages: {}\n=======\n>>>>>>> x\n")


def torn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  toy: [")


def leftover(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / f"models/refined.tmp-{DEAD}-0a1b2c3d").mkdir(parents=True)
    (root / f"models/core.tmp-{os.getpid()}-0a1b2c3d").mkdir()  # of a process that lives


def damaged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(root / store.STORE, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)


def away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")


def unknown_profile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRESCENDO_COMPUTE", "moon")


def bad_params(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(root, core={"channels": "many"})


def no_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRESCENDO_GIT_COMMIT")


def unsent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(root / "runs/toy/0123456789abcdef/tracking.jsonl", "a") as file:
        file.write('{"kind": "points", "points": [["loss", 2.0, 16, 1]]}\n')


def other_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pins", lambda lock: {"torch": "0.1", "no-such-package": "1"})


def full_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK", 2**60)


def read_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / "runs")
    (root / "runs").write_text("a file")


def test_where_nothing_is_wrong_nothing_is_to_mend_and_nothing_changes(project: Path) -> None:
    before = sorted(path for path in project.rglob("*") if ".dvc" not in path.parts)
    assert ill(project) == []
    assert sorted(path for path in project.rglob("*") if ".dvc" not in path.parts) == before


@pytest.mark.parametrize(
    ("harm", "subject", "text", "cure"),
    [
        (conflict, "dvc", "merge conflict", "git checkout --ours"),
        (torn, "dvc", "dvc.lock: line 3", "git checkout dvc.lock"),
        (leftover, "leftovers", f"refined.tmp-{DEAD}", "crescendo clean"),
        (damaged, "mlflow", "mlflow.db", "restore it"),
        (away, "mlflow", "http://127.0.0.1:9: ", "MLFLOW_TRACKING_URI"),
        (unknown_profile, "params", "no compute profile 'moon'", "choose one of"),
        (bad_params, "params", "core.channels", "integer"),
        (no_commit, "git", "no commit", "git init"),
        (unsent, "mlflow", "not sent", "crescendo sync"),
        (other_package, "python", "torch", "requirements.lock"),
        (full_disk, "machine", "GiB of disk free", "free some space"),
        (read_only, "storage", "runs", ""),
    ],
)
def test_what_is_wrong_is_found_with_its_cure(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[..., None],
    subject: str,
    text: str,
    cure: str,
) -> None:
    harm(project, monkeypatch)
    found = [finding for finding in ill(project) if finding.subject == subject]
    assert len(found) == 1 and text in found[0].text and cure in found[0].fix, ill(project)
    assert "secret" not in str(ill(project))


def test_a_store_that_was_moved_is_said_to_follow(template: Path, project: Path) -> None:
    text = next(finding.text for finding in examine(project) if finding.subject == "mlflow")
    assert f"moved here from {template.as_uri()}" in text
    assert moved_from(project / store.STORE), "the doctor changes nothing"


def test_the_lock_file_names_a_version_for_this_interpreter() -> None:
    pins = machine.pins(ROOT / "requirements.lock")
    assert len(pins) > 100 and pins["torch"][0].isdigit()
