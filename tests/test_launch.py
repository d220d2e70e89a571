"""Launching: fingerprints, progress, one-line failures, restarts. The toy worker counts in a file."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts
from pipeline.compute import ComputeProfile
from pipeline.errors import BadData, Busy, InputMissing
from pipeline.launch import execution, failures, fingerprint, jobs, progress
from pipeline.launch.stage import open_stage


def toy(config: dict[str, Any]) -> None:
    """Count to 5 together, a checkpoint each; the last worker kills itself once at 3."""
    import torch
    import torch.distributed as dist

    run_dir = Path(config["run_dir"])
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    saved = run_dir / "count"
    start = int(saved.read_text()) if saved.exists() else 0
    for count in range(start + 1, 6):
        total = torch.tensor(count)
        if size > 1:
            dist.all_reduce(total)
        if rank == size - 1 and count == 3 and config.get("kill") and not (run_dir / "killed").exists():
            (run_dir / "killed").write_text(str(count))
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == size - 1 and count == 4 and config.get("fail"):
            raise BadData("E-DAT-999", "toy", "has a bad\nimage", "remove it")
        if size > 1:
            dist.barrier()
        if rank == 0:
            assert int(total) == count * size
            artifacts.write_atomic(saved, str(count))
            with open(run_dir / "progress.jsonl", "a") as file:
                record = {"nimg": count, "total": 5, "time": time.time(), "metrics": {"loss": 1 / count}}
                file.write(json.dumps(record) + "\n")
    if rank == 0 and start < 5:
        with artifacts.commit_directory(run_dir / "result") as folder:
            (folder / "starts").write_text(f"{start} {size}")


def config_of(run_dir: Path, **more: object) -> dict[str, Any]:
    run_dir.mkdir(exist_ok=True)
    return {"run_dir": str(run_dir), "root": str(run_dir), **more}


TWO = ComputeProfile(workers=2, max_failures=1)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Ray of this machine for all tests of this module, with a home folder to look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield from _session()


def _session() -> Any:
    with execution.ray_session(2, inside_job=False):
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Workers cannot import a test.
        yield


@pytest.mark.ray
def test_a_killed_worker_continues_from_its_checkpoint(two_workers: None, tmp_path: Path) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    execution.train_under_ray("toy", toy, config_of(tmp_path / "run", kill=True), TWO)
    assert (tmp_path / "run/killed").read_text() == "3"
    assert (tmp_path / "run/result/starts").read_text() == "2 2"
    assert not (tmp_path / "run/ray").exists()
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ray would take Ctrl-C over.


@pytest.mark.ray
def test_ray_asks_for_a_token_and_leaves_none_in_the_home_folder(two_workers: None) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not list(Path.home().iterdir())


@pytest.mark.ray
def test_a_worker_that_always_dies_ends_in_one_line(two_workers: None, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", kill=True)
    with pytest.raises(Busy, match="worker 1 died") as caught:
        execution.train_under_ray("toy", toy, config, ComputeProfile(workers=2, max_failures=0))
    assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_a_pipeline_error_of_one_worker_surfaces_unchanged(two_workers: None, tmp_path: Path) -> None:
    execution.train_under_ray("toy", toy, config_of(tmp_path / "run", fail=True), TWO)
    with pytest.raises(BadData) as caught:
        failures.raise_failure(tmp_path / "run")
    assert str(caught.value) == "E-DAT-999 toy: has a bad\\nimage. Fix: remove it"
    assert not (tmp_path / "run/failure.json").exists()


def test_a_bug_in_a_worker_is_told_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        failures.record_failure(lambda config: config["nothing"], config_of(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        failures.raise_failure(tmp_path / "run")


def test_what_a_restart_may_cure_leaves_no_record_and_a_record_ends_the_restart(tmp_path: Path) -> None:
    def lost(config: dict[str, Any]) -> None:
        raise RuntimeError("connection closed by peer")

    config = config_of(tmp_path / "run")
    with pytest.raises(RuntimeError, match="closed by peer"):
        failures.record_failure(lost, config)
    failures.raise_failure(tmp_path / "run")
    (tmp_path / "run/failure.json").write_text("{}")
    failures.record_failure(lost, config)


def test_the_tail_returns_every_whole_record_once_even_when_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = progress.Tail(path)
    assert tail.read() == []
    lines = [json.dumps({"nimg": n, "time": n / 10, "metrics": {}}) for n in range(4)]
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])
    assert [r["nimg"] for r in tail.read()] == [0, 1]
    with open(path, "a") as file:
        file.write(lines[2][9:] + "\n")
    assert [r["nimg"] for r in tail.read()] == [2]
    replaced = tmp_path / "new"
    replaced.write_text("\n".join([lines[0], lines[3]]) + "\n")
    replaced.replace(path)
    assert [r["nimg"] for r in tail.read()] == [3]
    assert tail.read() == []


def test_the_progress_line_tells_speed_loss_and_time_left() -> None:
    first = {"nimg": 0, "total": 1000, "time": 100.0, "metrics": {"loss": 2.0}}
    last = {"nimg": 400, "total": 1000, "time": 140.0, "metrics": {"loss": 0.5}}
    assert progress.progress_line("toy", first, last) == "toy 400/1,000 images, 10/s, loss 0.5, 1:00 left"
    assert progress.progress_line("toy", last, last) == "toy 400/1,000 images, loss 0.5"


@pytest.fixture()
def project(tmp_path: Path) -> Path:
    """A repository with one stage, whose dependency is named by a parameter."""
    (tmp_path / "params.yaml").write_text("seed: 1\ntoy: {init: data/in, lr: 1e-4}\nother: 2\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  toy:\n    cmd: x\n    deps: ['${toy.init}', code.py]\n    params: [seed, toy.lr]\n"
        "    outs: [out, {other: {cache: false}}]\n"
    )
    (tmp_path / "code.py").write_text("pass\n")
    with artifacts.commit_directory(tmp_path / "data/in") as folder:
        (folder / "x").write_text("1")
    return tmp_path


def test_the_fingerprint_follows_code_inputs_and_the_stages_own_params_only(project: Path) -> None:
    first = fingerprint.stage_fingerprint("toy", project)
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("other: 2", "other: 3") + "# comment\n")
    assert fingerprint.stage_fingerprint("toy", project) == first
    (project / "params.yaml").write_text(params.replace("1e-4", "2e-4"))
    assert fingerprint.stage_fingerprint("toy", project) != first
    (project / "params.yaml").write_text(params)
    (project / "code.py").write_text("pass  # changed\n")
    assert fingerprint.stage_fingerprint("toy", project) != first
    (project / "code.py").write_text("pass\n")
    assert fingerprint.stage_fingerprint("toy", project) == first
    assert fingerprint.outputs("toy", project) == ["out", "other"]


def test_what_lies_behind_a_url_is_known_by_names_and_sizes() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.png", b"one")
    before = fingerprint.digest_url("memory://bucket")
    assert fingerprint.digest_url("memory://bucket") == before
    store.pipe("/bucket/b.png", b"two")
    assert fingerprint.digest_url("memory://bucket") != before
    with pytest.raises(InputMissing, match="E-INP-061 nowhere://bucket"):
        fingerprint.digest_url("nowhere://bucket")


def test_a_missing_dependency_is_named(project: Path) -> None:
    (project / "code.py").unlink()
    with pytest.raises(InputMissing, match=r"code\.py: is missing"):
        fingerprint.stage_fingerprint("toy", project)


def toy_stage(project: Path, monkeypatch: pytest.MonkeyPatch, **more: object) -> Any:
    """`launch.stage` in `project`, in process, with its own tracking store."""
    (project / "infra/compute").mkdir(parents=True, exist_ok=True)
    (project / "infra/compute/local.yaml").write_text("workers: 0\n")
    for name in ("MLFLOW_TRACKING_URI", "CRESCENDO_COMPUTE", "CRESCENDO_RUNS"):
        monkeypatch.delenv(name, raising=False)
    from pipeline.config.params import load_params

    return open_stage("toy", load_params(Path(__file__).parents[1] / "params.yaml"), project)


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
    assert "finished before" in capsys.readouterr().err


def test_inputs_reach_the_shared_storage_once_a_digest(project: Path, tmp_path: Path) -> None:
    storage, run_dir = tmp_path / "nfs", tmp_path / "nfs/runs/toy/1"
    for _ in range(2):
        view = jobs.share_inputs(project, storage, run_dir, ["data/in"])
    assert (view / "data/in/x").read_text() == "1"
    assert len(list((storage / "inputs").iterdir())) == 1


def test_progress_reaches_the_terminal_and_the_tracker_once(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.records: list[Any] = []

        def log_batch(self, records: list[Any]) -> None:
            self.records += records

    tracker, out = Tracker(), io.StringIO()
    with progress.ProgressWatch("toy", tmp_path, tracker, out):  # type: ignore[arg-type]
        toy(config_of(tmp_path))
    assert [record["nimg"] for record in tracker.records] == [1, 2, 3, 4, 5]
    assert "toy 5/5 images" in out.getvalue()


def test_a_stage_told_to_stop_by_a_dying_parent_unwinds() -> None:
    code = (
        "import subprocess, sys, time, os\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time\\n"
        "from pipeline import launch, errors\\n"
        "def main():\\n  launch.die_with_dvc(); print(1, flush=True); time.sleep(60)\\n"
        "errors.run_main(main)'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); os._exit(0)\n"
    )
    environment = {**os.environ, "DVC_STAGE": "toy"}
    parent = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "stopped" in parent.stderr  # The pipe closes only when the grandchild has ended, too.
