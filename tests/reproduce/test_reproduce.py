"""A version is made again outside of the project, which stays as it is; stages of a moment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import Busy, ConfigError, InputMissing, StorageError
from pipeline.housekeeping.leftovers import RECORDS, REPRODUCTIONS, reproductions
from pipeline.launch.fingerprint import digest_path
from pipeline.launch.machine import facts_here
from pipeline.registry.package import Version
from pipeline.reproduce import environment, reproduce, workplace, worktree
from pipeline.reproduce.comparison import Report
from pipeline.reproduce.plan import Plan, Request
from pipeline.reproduce.recipe import Recipe
from tests.conftest import ROOT

# Copies its input and the seed; `TOY` makes it wait, fail or write something else.
STAGE = """
import os, signal, sys, time
from pathlib import Path
import yaml
stage, source, out = {0!r}
kind = os.environ.get("TOY", "")
if kind == "fail":
    sys.exit(74)
if kind == "wait" and stage == "pretrain":
    Path("waiting").touch()
    time.sleep(60)
seed = yaml.safe_load(Path("params.yaml").read_text())["seed"]
Path(out).mkdir(parents=True, exist_ok=True)
source = Path(source)
text = source.read_text() if source.is_file() else (source / "x").read_text()
Path(out, "x").write_text(f"{{text}} {{seed}}" + "!" * (kind == "loud"))
Path(f"runs/{{stage}}/0").mkdir(parents=True)
Path("reports/prepare").mkdir(parents=True, exist_ok=True)
"""
# `crescendo reproduce` of a recipe that is given as JSON.
PROGRAM = """
import json, sys, tempfile
from pathlib import Path
from pipeline.errors import run_main
from pipeline.registry.package import Version
from pipeline.reproduce import plan, recipe, reproduce
root, tempfile.tempdir, stored = sys.argv[1:]
values = json.loads(stored)
values |= {name: Path(values[name]) for name in ("files", "snapshot")}
plan.read_recipe = lambda *at: at[2].mkdir() or recipe.Recipe(**values)
reproduce.champions.resolve = lambda *_: Version("toy", "1")
run_main(lambda: reproduce.reproduce(Path(root), "models:/toy/1", plan.Request(), print) and 0)
"""
DVC_YAML = """
stages:
  prepare: {cmd: x, deps: ["${data.path}"], outs: [data/prepared, reports/prepare]}
  pretrain: {cmd: x, deps: [data/prepared], outs: [models/core]}
  other: {cmd: x, deps: [models/core], outs: [models/other]}
"""
PARAMS = "seed: {0}\ndata: {{path: data/raw}}\n"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a sub-folder of a repository, with raw data that git does not know."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("TOY", "CRESCENDO_COMPUTE", "GIT_DIR"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "repository/project"
    (root / "stages").mkdir(parents=True)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text(PARAMS.format(1))
    (root / ".gitignore").write_text("data\nmodels\n")
    (root / "infra/compute").mkdir(parents=True)
    (root / "infra/compute/local.yaml").write_text("workers: 0\n")
    (root / "infra/compute/far.yaml").write_text("address: http://head:8265\nstorage: /mnt/x\n")
    (root / "stages/__init__.py").touch()
    for stage in (("prepare", "data/raw", "data/prepared"), ("pretrain", "data/prepared", "models/core")):
        (root / f"stages/{stage[0]}.py").write_text(STAGE.format(stage))
    git(root.parent, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    (root / "data/raw").mkdir(parents=True)
    (root / "data/raw/x").write_text("images")
    return root


@pytest.fixture
def recipe(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of a version that this project made, with another seed that was not committed."""
    files, made = tmp_path / "files", tmp_path / "made"
    files.mkdir()
    (files / "params.yaml").write_text(PARAMS.format(2))
    for path, text in (("data/prepared", "images 2"), ("models/core", "images 2 2")):
        (made / path).mkdir(parents=True)
        (made / path / "x").write_text(text)
    paths = {"data/raw": root / "data/raw", "data/prepared": made / "data/prepared"}
    digests = {
        path: digest_path(place) for path, place in (paths | {"models/core": made / "models/core"}).items()
    }
    facts = dict.fromkeys(("prepare", "pretrain"), facts_here(Path("none")))
    recipe = Recipe(
        "models:/toy/1", "models/core", digests["models/core"], git(root, "rev-parse", "HEAD"), files,
        made / "models/core", digests, facts, {"prepare": 2.0},
    )  # fmt: skip
    monkeypatch.setattr("pipeline.reproduce.plan.read_recipe", lambda *at: at[2].mkdir() or recipe)
    monkeypatch.setattr(reproduce.champions, "resolve", lambda *_: Version("toy", "1"))
    return recipe


def again(root: Path, **request: object) -> Report:
    found = reproduce.reproduce(root, "models:/toy/1", Request(**request), lambda line: None)
    assert isinstance(found, Report)
    return found


def traces(root: Path) -> list[str]:
    """All files of the project with their content, but for git's own; and what is left outside."""
    files = [path for path in root.rglob("*") if path.is_file() and ".git" not in path.parts]
    left = [path.name for path in (root.parents[1] / "tmp").iterdir()]
    trees = git(root, "worktree", "list").splitlines()[1:]
    return sorted(f"{path} {path.read_text()}" for path in files) + left + trees


def test_the_same_digests_are_identical_and_nothing_is_left(root: Path, recipe: Recipe) -> None:
    before = traces(root)
    report = again(root)
    assert report.identical and [outcome.stage for outcome in report.outcomes] == ["prepare", "pretrain"]
    assert [output.path for outcome in report.outcomes for output in outcome.outputs] == [
        "data/prepared",
        "models/core",
    ], "reports are not compared"
    assert report.inputs == {"data/raw": "the project"}
    assert traces(root) == before


def test_a_dry_run_says_what_it_takes(root: Path, recipe: Recipe) -> None:
    before = traces(root)
    plan = reproduce.reproduce(root, "models:/toy/1", Request(dry_run=True), print)
    assert isinstance(plan, Plan)
    lines = list(plan.lines())
    assert lines[2:] == [
        "input        data/raw: the project",
        "prepare      data/prepared: took 2 s",
        "pretrain     models/core: its time is not known",
        "in all       2 s then, and what is not known",
    ]
    assert plan.to_json()["stages"][0] == {"stage": "prepare", "outputs": ["data/prepared"], "seconds": 2.0}
    assert traces(root) == before


def test_one_stage_takes_the_inputs_that_it_had(root: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="E-INP-168 data/prepared: .* missing in the project"):
        again(root, only="pretrain")
    shutil.copytree(tmp_path / "made/data/prepared", root / "data/prepared")
    report = again(root, only="pretrain")
    assert report.identical and [outcome.stage for outcome in report.outcomes] == ["pretrain"]
    with pytest.raises(ConfigError, match="E-CFG-160 --only: 'x' is no stage"):
        again(root, only="x")
    with pytest.raises(InputMissing, match="E-INP-169 .* does not say what its stage other made"):
        again(root, only="other")
    assert not list((tmp_path / "tmp").iterdir())


def test_the_first_stage_that_differs_is_named_with_its_cause(
    root: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe.facts, "prepare", {**recipe.facts["prepare"], "instructions": "avx3"})
    monkeypatch.setenv("TOY", "loud")
    report = again(root)
    assert not report.identical and [outcome.stage for outcome in report.outcomes] == ["prepare"]
    assert [cause.kind for cause in report.outcomes[0].causes] == ["another processor"]


def test_changed_data_are_refused_or_named_as_the_cause(root: Path, recipe: Recipe) -> None:
    (root / "data/raw/x").write_text("other images")
    with pytest.raises(InputMissing, match="E-INP-168 data/raw: the version was made from .*`--data here`"):
        again(root)
    report = again(root, own_data=True)
    assert report.outcomes[0].stage == "prepare" and report.outcomes[0].differs
    assert report.outcomes[0].causes[0] == ("other data", "data/raw is not what the version was made from")


@pytest.mark.parametrize(
    ("profile", "error"),
    [("far", "E-CFG-162 .* on a cluster"), ("moon", "E-CFG-163 .*choose one of: far, local")],
)
def test_a_profile_of_a_cluster_or_none_is_refused(
    root: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, profile: str, error: str
) -> None:
    before = traces(root)
    monkeypatch.setenv("CRESCENDO_COMPUTE", profile)
    with pytest.raises(ConfigError, match=error):
        again(root)
    assert traces(root) == before


def test_a_commit_that_is_not_here_and_no_repository_are_one_line(
    root: Path, recipe: Recipe, tmp_path: Path
) -> None:
    for commit in ("0" * 40, "--help", "c0ffee"):
        with pytest.raises(InputMissing, match="E-INP-164 .*git fetch"):
            worktree.require_commit(root, commit, "models:/toy/1")
    with pytest.raises(InputMissing, match="E-INP-163"):
        worktree.require_commit(tmp_path, recipe.commit, "models:/toy/1")


def test_a_patch_that_does_not_apply_is_one_line_and_leaves_nothing(root: Path, recipe: Recipe) -> None:
    before = traces(root)
    (recipe.files / "uncommitted.patch").write_text("--- a/none\n+++ b/none\n@@ -1 +1 @@\n-x\n+y\n")
    with pytest.raises(StorageError, match="E-IO-160 git: apply uncommitted.patch failed: error: none"):
        again(root)
    assert traces(root) == before


def test_a_failing_stage_keeps_the_work_tree_and_the_same_command_goes_on(
    root: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY", "fail")
    with pytest.raises(StorageError, match="E-IO-161 prepare: ends with status 74 in the work tree"):
        again(root)
    (kept,) = (tmp_path / "tmp").iterdir()
    assert not list(reproductions(root)), "it may go on"
    monkeypatch.delenv("TOY")
    assert again(root).identical and not kept.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on_or_is_cleaned(
    root: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stored = json.dumps(vars(recipe), default=str)
    command = [sys.executable, "-c", PROGRAM, str(root), tempfile.gettempdir(), stored]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TOY": "wait"}, stdout=subprocess.DEVNULL)
    wait_for(lambda: list((tmp_path / "tmp").glob("*/tree/project/waiting")))
    with pytest.raises(Busy, match="E-BUSY-001"):
        again(root)
    child.send_signal(number)
    assert child.wait() == (75 if number == signal.SIGTERM else -9)
    (kept,) = (tmp_path / "tmp").iterdir()
    assert list(json.loads((kept / "seconds.json").read_text())) == ["prepare"]
    if number == signal.SIGTERM:
        assert again(root).identical and not kept.exists()
        return
    wait_for(lambda: not works_in(kept))  # the stage dies with its parent
    for path in (kept, *kept.glob("*")):
        os.utime(path, (0, 0))
    assert [item.kind for item in reproductions(root)] == [REPRODUCTIONS, RECORDS]


def works_in(folder: Path) -> list[Path]:
    """Processes whose working directory is below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found += [path] if path.readlink().is_relative_to(folder) else []
    return found


def wait_for(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_folder_of_another_user_is_not_used(tmp_path: Path, root: Path) -> None:
    (tmp_path / "tmp" / f"{workplace.PREFIX}k").symlink_to(tmp_path)
    with pytest.raises(Exception, match="E-ACC-160"), workplace.workplace(root, "k"):
        pass


def test_other_packages_are_named_and_an_environment_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    assert "has no" in environment.choose(lock, False, tmp_path / "e").words
    lock.write_text("pytest==0.1 \\\n    --hash=sha256:0\nno-such-thing==1\n")
    here, new = (environment.choose(lock, here, tmp_path / "e") for here in (True, False))
    assert here.packages["no-such-thing"] == "missing" and not here.new
    assert new.new and new.packages == {} and new.words.startswith("a new one of 2 packages; here 2 of 2")
    with pytest.raises(Busy, match=r"E-BUSY-160 .*\(ERROR: no index\)"):
        environment._run([sys.executable, "-c", "import sys; sys.exit('WARNING: x\\nERROR: no index')"])
