"""`crescendo clean` frees what nothing needs, and touches nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli.main import run
from pipeline.compute import ComputeProfile
from pipeline.config.params import load_params
from pipeline.housekeeping import items
from pipeline.housekeeping.clean import Plan, carry_out, plan, told
from pipeline.housekeeping.needs import Needs, find_needs
from pipeline.launch.history import MADE_FROM
from tests.conftest import ROOT

CURRENT = {
    "stage": "pretrain",
    "params": {"pretrain": {"lr": 0.5, "log_images": 8}},
    "deps": {"pipeline/x": "c"},
}
CURRENT |= {"format": 3}
DEAD = 2**22 + 1  # above the largest number of a process
OLD = time.time() - 3 * 86400


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("CRESCENDO_RUNS", raising=False)
    folder = tmp_path / "project"
    (folder / "models").mkdir(parents=True)
    return folder


def needs(models: frozenset[str] = frozenset()) -> Needs:
    return Needs(
        load_params(ROOT / "params.yaml"),
        {"pretrain": CURRENT},
        {"pretrain": {"pretrain": {"lr": 7}}},
        models,
    )


def make_run(
    runs: Path, number: int, lr: float = 0.1, finished: bool = True, age: float = 0.0, stage: str = "pretrain"
) -> Path:
    """A run folder; with 512 bytes of checkpoint, and a result if it has finished."""
    run = runs / stage / f"{number:016x}"
    for nimg in (64, 128):
        with artifacts.commit_directory(run / f"checkpoints/nimg-{nimg:012d}") as folder:
            (folder / "state.safetensors").write_bytes(b"x" * 512)
    if finished:
        with artifacts.commit_directory(run / "result") as result:
            with artifacts.commit_directory(result / "model") as model:
                (model / "model.safetensors").write_text(str(number))
    (run / "lease").touch()
    made_from = CURRENT | {"stage": stage, "params": {"pretrain": {"lr": lr, "log_images": 16}}}
    (run / MADE_FROM).write_text(json.dumps(made_from))
    os.utime(run / MADE_FROM, (time.time() - age,) * 2)
    return run


def paths(made: Plan) -> set[Path]:
    return {item.path for item in made.items}


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_only_finished_runs_that_nothing_needs_are_removed(root: Path) -> None:
    runs = root / "runs"
    free = [make_run(runs, number, age=100.0 * number) for number in (1, 2, 3)]
    registered = make_run(runs, 4)
    digest = artifacts.directory_digest(registered / "result/model")
    stay = [make_run(runs, 5, lr=0.5), make_run(runs, 6, lr=7), make_run(runs, 7, finished=False), registered]
    spool = make_run(runs, 8)
    (spool / "tracking.jsonl").write_text('{"kind": "begin"}\n')
    (spool / "tracking.json").write_text('{"server": {"run": "r", "sent": 3}}')
    strange = runs / "pretrain" / f"{9:016x}"
    strange.mkdir()
    made = plan(root, ComputeProfile(), needs(frozenset({digest})), keep=1)
    assert paths(made) == set(free[1:])
    assert made.stay == Counter({
        "among the newest": 1, "of the current parameters": 1, "of dvc.lock": 1, "unfinished": 1,
        "of a registered model": 1, "not yet sent to MLflow": 1, "of unknown origin": 1,
    })  # fmt: skip
    before = snapshot(root)
    lines = [*told(made, root, freed=False)]
    assert snapshot(root) == before
    done = carry_out(made)
    assert [line.replace("freed", "would free") for line in told(done, root, freed=True)] == lines
    assert re.fullmatch(r"runs: 2, 0\.\d MiB", lines[0])
    assert re.fullmatch(r"would free 0\.\d MiB in all", lines[-1])
    assert all(path.is_dir() for path in (*stay, spool, strange, free[0]))
    assert not any(path.exists() for path in free[1:])
    assert not plan(root, ComputeProfile(), needs(frozenset({digest})), keep=1).items


def test_what_a_stage_holds_stays_even_if_it_began_after_planning(root: Path) -> None:
    held, begins = make_run(root / "runs", 1), make_run(root / "runs", 2)
    artifacts.copy_into_place(begins / "checkpoints", begins / f"checkpoints.tmp-{DEAD}-0a0a0a0a")
    with artifacts.lease(held / "lease"):
        made = plan(root, ComputeProfile(), needs(), keep=0)
        assert paths(made) == {begins}
        with artifacts.lease(begins / "lease"):
            done = carry_out(made)
    assert not done.items
    assert done.stay["in use"] == 2
    assert begins.is_dir()


def test_a_kill_while_a_run_is_removed_leaves_nothing_of_it_to_go_on_from(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(root / "runs", 1)
    made = plan(root, ComputeProfile(), needs(), keep=0)

    def killed(path: Path) -> None:
        shutil.rmtree(path / "result")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(items.artifacts, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_out(made)
    assert not run_dir.exists()
    assert not [*(root / "runs/pretrain").iterdir()]
    monkeypatch.setattr("pipeline.artifacts.is_alive", lambda pid: False)
    again = plan(root, ComputeProfile(), needs(), keep=0)
    assert [item.kind for item in again.items] == ["half-written files"]
    carry_out(again)
    assert not [path for path in (root / "runs").iterdir() if path.name != "pretrain"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(root: Path) -> None:
    runs = root / "runs"
    unfinished = make_run(runs, 1, finished=False)
    gone = [
        root / f"models/core.tmp-{DEAD}-0a0a0a0a",
        runs / f"pretrain/{1:016x}.tmp-{DEAD}-0a0a0a0a",
        unfinished / f"checkpoints/nimg-000000000192.tmp-{DEAD}-0a0a0a0a",
        unfinished / f"to-64/checkpoints/nimg-000000000064.tmp-{DEAD}-0a0a0a0a",
        unfinished / "checkpoints/quarantine",
        unfinished / "ray",
        runs / f"prepare/cache/pictures/{'a' * 16}/block-1.tmp-{DEAD}-0a0a0a0a",
    ]
    stay = [
        root / f"models/core.tmp-{os.getpid()}-0a0a0a0a",
        root / f"models/refined.old-{DEAD}-0a0a0a0a",  # the only copy
        root / "models/mine.tmp-of-yesterday",
    ]
    for path in (*gone, *stay):
        path.mkdir(parents=True)
    made = plan(root, ComputeProfile(), needs(), keep=1)
    assert paths(made) == set(gone)
    carry_out(made)
    assert all(path.is_dir() for path in stay)
    assert not any(path.exists() for path in gone)
    assert len([*unfinished.glob("checkpoints/nimg-*")]) == 2


def test_caches_that_the_parameters_use_stay_and_so_do_the_newest_others(root: Path) -> None:
    from pipeline.housekeeping.caches import _picture_keys

    used = _picture_keys(needs()).pop()
    cache = root / "runs/prepare/cache/pictures"
    for age, name in enumerate((used, "a" * 16, "b" * 16)):
        (cache / name / "block-1").mkdir(parents=True)
        os.utime(cache / name, (OLD - age,) * 2)
    (root / "runs/init" / ("d" * 64)).mkdir(parents=True)
    copies = root / "runs/prepare/copies"
    copies.mkdir()
    for name in ("e" * 32, "f" * 32, "cache.lock"):
        (copies / name).touch()
    os.utime(copies / ("e" * 32), (OLD, OLD))
    expected = {cache / ("b" * 16), copies / ("e" * 32)}
    assert paths(plan(root, ComputeProfile(), needs(), keep=1)) == expected
    expected |= {cache / ("a" * 16), root / "runs/init" / ("d" * 64)}
    assert paths(plan(root, ComputeProfile(), needs(), keep=0)) == expected
    lease = root / "runs/prepare" / f"{1:016x}" / "lease"
    with artifacts.lease(lease):
        assert not plan(root, ComputeProfile(), needs(), keep=0).items


@pytest.mark.parametrize("elsewhere", ["a link", "CRESCENDO_RUNS", "storage"])
def test_runs_may_lie_elsewhere_and_links_out_of_them_are_not_followed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    runs, outside = tmp_path / "disk/runs", tmp_path / "outside"
    run_dir, foreign, linked = make_run(runs, 1), make_run(outside, 2), make_run(outside, 3, stage="refine")
    (run_dir / "notes").symlink_to(outside)
    (runs / "pretrain" / f"{2:016x}").symlink_to(foreign)
    (runs / "refine").symlink_to(linked.parent)
    (outside / f"precious.tmp-{DEAD}-0a0a0a0a").mkdir()
    (root / "reports").symlink_to(outside)
    before, profile = snapshot(outside), ComputeProfile()
    if elsewhere == "a link":
        (root / "runs").symlink_to(runs)
    elif elsewhere == "storage":
        profile = ComputeProfile(storage=str(tmp_path / "disk"))
    else:
        monkeypatch.setenv("CRESCENDO_RUNS", str(runs))
    done = carry_out(plan(root, profile, needs(), keep=0))
    assert paths(done) == {run_dir}
    assert not run_dir.exists()
    assert snapshot(outside) == before


def test_what_is_another_users_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(root / "runs", 1)
    (root / f"models/core.tmp-{DEAD}-0a0a0a0a").mkdir()
    (root / "runs/init" / ("d" * 64)).mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    made = plan(root, ComputeProfile(), needs(), keep=0)
    assert not made.items
    assert made.stay == Counter({"of another user": 1})


def test_inputs_of_jobs_stay_while_a_run_links_to_them(root: Path, tmp_path: Path) -> None:
    storage = tmp_path / "disk"
    run_dir = make_run(storage / "runs", 1, finished=False)
    for name in ("a" * 64, "b" * 64, "c" * 64):
        (storage / "inputs" / name).mkdir(parents=True)
        if name[0] != "c":
            os.utime(storage / "inputs" / name, (OLD, OLD))
    (run_dir / "inputs/data").mkdir(parents=True)
    (run_dir / "inputs/data/prepared").symlink_to(
        os.path.relpath(storage / "inputs" / ("a" * 64), run_dir / "inputs/data")
    )
    made = plan(root, ComputeProfile(storage=str(storage)), needs(), keep=0)
    assert paths(made) == {storage / "inputs" / ("b" * 64)}


def test_sessions_of_ray_go_when_they_are_old_and_nobody_s(root: Path, tmp_path: Path) -> None:
    ray = tmp_path / "tmp/ray"
    names = [f"session_2026-01-01_00-00-00_000000_{pid}" for pid in (DEAD, os.getpid(), DEAD + 1)]
    for name in names:
        (ray / name / "logs").mkdir(parents=True)
        for path in (ray / name / "logs", ray / name):
            os.utime(path, (OLD, OLD))
    (ray / names[2] / "logs/raylet.out").touch()
    (ray / "session_latest").symlink_to(ray / names[0])
    assert paths(plan(root, ComputeProfile(), needs(), keep=0)) == {ray / names[0]}


def test_what_is_needed_is_read_from_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pipeline", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    lock = "stages: {refine: {params: {params.yaml: {seed: 3, refine: {lr: 1}}}}}"
    (tmp_path / "dvc.lock").write_text(lock)
    found = find_needs(tmp_path)
    made_from = json.loads(json.dumps(found.current["refine"]))
    assert found.why(made_from) == "of the current parameters"
    other_code = made_from | {"deps": made_from["deps"] | {"pipeline/rng.py": "other"}}
    assert found.why(other_code | {"deps": {**made_from["deps"], "data/prepared": "d"}}) == found.why(
        made_from
    )
    assert found.why(other_code) is None
    assert found.why(other_code | {"params": {"seed": 3, "refine": {"lr": 1}}}) == "of dvc.lock"
    assert found.models == frozenset()


def test_a_negative_number_to_keep_is_refused() -> None:
    with pytest.raises(Exception, match="E-CFG-085"):
        run(["clean", "--keep", "-1"])
