"""A stage: its lease, its finished runs, its end with DVC."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts
from pipeline.compute import ComputeProfile
from pipeline.config.params import load_params
from pipeline.data.cache import Cache
from pipeline.data.folders import FarFolder
from pipeline.errors import Busy, ConfigError
from pipeline.launch.stage import Stage, open_stage, require_whole_shards
from pipeline.launch.worker import WorkerConfig
from pipeline.tracking.stage_run import StageRun
from tests.conftest import ROOT
from tests.launch.toy import toy


def toy_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stage of `project`, in process, with its own tracking store."""
    (project / "infra/compute").mkdir(parents=True, exist_ok=True)
    (project / "infra/compute/local.yaml").write_text("workers: 0\n")
    for name in ("MLFLOW_TRACKING_URI", "CRESCENDO_COMPUTE", "CRESCENDO_RUNS"):
        monkeypatch.delenv(name, raising=False)
    return open_stage("toy", load_params(ROOT / "params.yaml"), project)


def test_workers_that_do_not_divide_the_shards_are_refused_before_they_start() -> None:
    for workers in (0, 1, 2, 3, 6, (3, 4), (1, 4)):
        require_whole_shards("pretrain", 6, ComputeProfile(workers=workers))
    for workers, named in ((4, "4"), ((4, 5), "4 to 5")):
        problem = (
            rf"E-CFG-025 params.yaml: pretrain.shards: 6 .* among {named} workers.* to one of 1, 2, 3, 6;"
        )
        with pytest.raises(ConfigError, match=problem):
            require_whole_shards("pretrain", 6, ComputeProfile(workers=workers))


def test_a_finished_run_exports_again_without_training(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with toy_stage(project, monkeypatch) as stage:
        stage.run(toy)
        stage.export({"result": "out"})
        with pytest.raises(Busy, match=str(os.getpid())):
            with toy_stage(project, monkeypatch):
                raise AssertionError("two at once")
    assert (project / "out/starts").read_text() == "0 1"
    (project / "out/starts").unlink()
    with toy_stage(project, monkeypatch) as stage:
        stage.run(lambda config: pytest.fail("trained again"))
        stage.export({"result": "out"})
    artifacts.verify_directory(project / "out")
    assert "is finished; exporting it" in capsys.readouterr().err


def test_an_export_removes_what_a_killed_one_left(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    alive = project / f"out.tmp-{os.getpid()}-0a0a0a0a"
    for left in (project / f"out.tmp-{dead.pid}-0123abcd", project / f"out.old-{dead.pid}-0123abcd", alive):
        left.mkdir()
        (left / "part").write_text("half")
    with toy_stage(project, monkeypatch) as stage:
        stage.run(toy)
        stage.export({"result": "out"})
    assert sorted(path.name for path in project.glob("out*")) == ["out", alive.name]
    artifacts.verify_directory(project / "out")


def test_prepared_data_go_to_a_store_by_digest_and_workers_are_told_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with artifacts.commit_directory(tmp_path / "data/prepared") as folder:
        (folder / "x").write_text("1")
    profile = ComputeProfile(data="memory://bucket/sets", cache=f"{tmp_path}/cache", cache_gib=0.5)
    params, digest = load_params(ROOT / "params.yaml"), artifacts.directory_digest(tmp_path / "data/prepared")
    inputs = {"data/prepared": digest, "models/core": "0"}
    tracker = StageRun(tmp_path, tmp_path / "run")
    stage = Stage("toy", params, profile, tmp_path, tmp_path / "run", "0", inputs, tracker)
    data, others = stage.share_data()
    assert (data, others) == (f"memory://bucket/sets/{digest}", ["models/core"])
    assert "toy: sending 1 of 1 files of prepared" in capsys.readouterr().err
    config = WorkerConfig.from_dict(json.loads(json.dumps(stage.worker_config(data=data).to_dict())))
    assert config.data is not None and config.cache is not None
    cache = Cache(Path(config.cache), int(config.cache_gib * 2**30))
    assert FarFolder(config.data, cache).path("x").read_text() == "1"


def test_workers_compute_as_the_profile_says(tmp_path: Path) -> None:
    how = {
        "precision": "bfloat16",
        "recompute": True,
        "cuda_graphs": False,
        "compile": True,
        "shard_state": True,
    }
    profile, params = ComputeProfile(**how), load_params(ROOT / "params.yaml")
    tracker = StageRun(tmp_path, tmp_path / "run")
    stage = Stage("toy", params, profile, tmp_path, tmp_path / "run", "0", {}, tracker)
    config = stage.worker_config()
    assert {name: getattr(config, name) for name in how} == how


def test_a_stage_is_stopped_by_the_death_of_its_parent() -> None:
    code = (
        "import subprocess, sys, time, os\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time\\n"
        "from pipeline import errors\\n"
        "from pipeline.launch import stage\\n"
        "def main():\\n  stage.stop_with_dvc(); print(1, flush=True); time.sleep(60)\\n"
        "errors.run_main(main)'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); os._exit(0)\n"
    )
    environment = {**os.environ, "DVC_STAGE": "toy"}
    parent = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "stopped" in parent.stderr  # The pipe closes only when the grandchild has ended, too.
