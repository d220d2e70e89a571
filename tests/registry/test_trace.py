"""The lineage of a version, drawn from what was stored with it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli import main
from pipeline.registry import provenance
from pipeline.registry.package import Registry
from pipeline.serving.announce import Running
from pipeline.tracking import stage_run
from tests.registry.conftest import ROOT


def run_stage(root: Path, stage: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """A run as a stage leaves it."""
    with stage_run.start_stage_run(stage, root, {}, inputs) as run:
        run.log_outputs(outputs)
    return str(run.run_id)


def test_a_version_shows_where_it_comes_from_without_the_project(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, data, core, tuned = (
        artifacts.directory_digest(root / "models/refined"),
        "d" * 64,
        "1" * 64,
        "e" * 64,
    )
    (root / "dvc.lock").write_text("stages: {}\n")
    prepared = {"data/prepared": data}
    runs = [
        run_stage(root, "prepare", {"data/raw": "5" * 64}, prepared),
        run_stage(root, "pretrain", prepared, {"models/core": core}),
        run_stage(root, "finetune", {**prepared, "models/core": core}, {"models/finetuned": tuned}),
        run_stage(root, "refine", {**prepared, "models/finetuned": tuned}, {"models/refined": digest}),
    ]
    main.run(["promote"])
    capsys.readouterr()
    (root / "dvc.lock").unlink()
    main.run(["trace", "models:/crescendo@champion", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["aliases"] == ["candidate", "champion"] and facts["digest"] == digest
    assert [stage["run_id"] for stage in facts["lineage"]["stages"]] == [runs[3], runs[0], runs[2], runs[1]]
    assert set(facts["lineage"]["files"]) == {"dvc.lock", "params.yaml"}
    assert facts["lineage"]["verdict"] == json.loads((root / "reports/verdict.json").read_text())
    receipt = {
        "stage": "pretrain",
        "passed": True,
        "kills": 20,
        "profile": "process",
        "seed": 0,
        "commit": None,
    }
    registry = Registry(root)
    registry.set_tags(registry.version("crescendo", "1"), {"crescendo.drill.pretrain": json.dumps(receipt)})
    services = [Running("http://127.0.0.1:8000/", True, "1", each) for each in (digest, "0" * 64)]
    shutil.copytree(ROOT / "infra/compute", root / "infra/compute")
    monkeypatch.setattr("pipeline.serving.announce.running", lambda runs: services)
    main.run(["trace", "models:/crescendo/1"])
    lines = [line.strip("│├└─ ") for line in capsys.readouterr().out.splitlines()]
    order = [
        "models:/crescendo/1 (candidate, champion)",
        "registered  20",
        "promote  20",
        "promote  20",
        "served  http://127.0.0.1:8000/, by this machine",
        "drill  pretrain: passed, 20 kills, profile process, seed 0",
        "code  commit c0ffee0",
        "dvc.lock  sha256",
        "params.yaml  sha256",
        f"model  refined {digest[:12]}",
        f"run  refine {runs[3]}",
        "from  finetuned eeeeeeeeeeee",
        f"run  finetune {runs[2]}",
        "from  core 111111111111",
        f"run  pretrain {runs[1]}",
        "data  dddddddddddd, validation ffffffffffff",
        f"run  prepare {runs[0]}",
        "source  data/raw 555555555555",
        "grown from  models:/crescendo/1",
        "verdict  against models/finetuned cccccccccccc",
        "evidence  ",
        "1 passes (1 calls)  passed",
        "kid_difference  passed  0  threshold 0.1",
    ]
    for line, start in zip(lines[: len(order)], order, strict=True):
        assert line.startswith(start), (line, start)


def test_the_patch_turns_the_commit_into_the_work_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    tree = tmp_path / "tree"
    (tree / "pipeline").mkdir(parents=True)
    (tree / "params.yaml").write_text("seed: 0\n")
    (tree / ".gitignore").write_text("*.pyc\n")

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(tree), *arguments], check=True, capture_output=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert provenance.uncommitted(tree, tmp_path / "index") == b""
    (tree / "params.yaml").write_text("seed: 1\n")
    (tree / "pipeline/new.py").write_bytes(b"new = 1\n")
    (tree / "pipeline/new.pyc").write_bytes(b"\0")
    (tree / "notes.txt").write_text("not a part of the code\n")
    status = git("status", "--short")
    patch = provenance.uncommitted(tree, tmp_path / "index")
    assert git("status", "--short") == status, "git's own index is as before"
    git("stash", "-u")
    (tmp_path / "patch").write_bytes(patch)
    git("apply", str(tmp_path / "patch"))
    assert (tree / "params.yaml").read_text() == "seed: 1\n"
    assert (tree / "pipeline/new.py").read_text() == "new = 1\n"
    assert b"new.pyc" not in patch and b"notes.txt" not in patch
    assert provenance.uncommitted(tmp_path / "nowhere", tmp_path / "index") == b""


def test_an_older_version_shows_its_tags(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["promote"])
    registry = Registry(root)
    folder = registry.folder_of(registry.version("crescendo", "1"))
    (folder / "artifacts/project/lineage.json").unlink()
    main.run(["trace", "models:/crescendo/1"])
    assert "not stored: registered by an earlier version" in capsys.readouterr().out
