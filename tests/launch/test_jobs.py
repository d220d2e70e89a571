"""A stage submitted to a Ray cluster of two nodes on this machine."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.job_submission import JobStatus
from ruamel.yaml import YAML

from benchmarks.chaos.ray_cluster import PATH, free_port, two_nodes
from pipeline import artifacts
from pipeline.compute import ComputeProfile
from pipeline.config.params import parse_params
from pipeline.errors import Busy, StorageError
from pipeline.launch import jobs
from pipeline.launch.worker import WorkerConfig
from pipeline.workers import pretrain
from stages.pretrain import train
from tests.conftest import ROOT


def printed(start: str) -> str:
    """The command that infra/README.md prints, which begins like this."""
    text = (ROOT / "infra/README.md").read_text().replace("\\\n", "")
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Dashboard URL of a Ray cluster of two nodes."""
    with two_nodes() as url:
        yield url


@pytest.fixture()
def checkout(tiny_root: Path, tmp_path: Path) -> Path:
    """A folder with our code and a tiny data set."""
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_root / "data", tmp_path / "code/data")
    return tmp_path / "code"


def config_of(tree: dict[str, Any], root: Path, run_dir: Path) -> WorkerConfig:
    params = {**tree, "pretrain": {**tree["pretrain"], "num_images": 16, "sample_images": 16}}
    run_dir.mkdir(parents=True)
    return WorkerConfig(parse_params(params), root, run_dir, precision="float32")


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_trains_what_this_process_would(
    address: str, checkout: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    storage = tmp_path / "nfs"
    profile = ComputeProfile(workers=1, address=address, storage=str(storage))
    config = config_of(tiny_tree, checkout, storage / "runs/pretrain/1")
    jobs.run_as_job("pretrain", train, config, profile, ["data/prepared"])
    here = config_of(tiny_tree, checkout, tmp_path / "here")
    pretrain.pretrain(here)
    models = [c.run_dir / "result/model/model.safetensors" for c in (config, here)]
    artifacts.verify_directory(models[0].parents[1])
    assert artifacts.sha256_file(models[0]) == artifacts.sha256_file(models[1])

    # A failure over there is the same error here.
    wrong = {**tiny_tree, "pretrain": {**tiny_tree["pretrain"], "lr": 1e38}}
    bad = config_of(wrong, checkout, storage / "runs/pretrain/2")
    with pytest.raises(StorageError, match=r"E-IO-023 .* is not finite"):
        jobs.run_as_job("pretrain", pretrain.pretrain, bad, profile, ["data/prepared"])


@pytest.mark.ray
@pytest.mark.slow
def test_stages_submitted_by_hand_read_and_write_the_shared_storage(
    address: str, checkout: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Preparing, spread over the cluster by Ray Data, and training."""
    storage = tmp_path / "nfs"
    shutil.rmtree(checkout / "data")
    for number in range(40):
        path = storage / f"data/raw/{'cats' if number % 2 else 'dogs'}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    for name in ("dvc.yaml", ".rayignore"):
        shutil.copy(ROOT / name, checkout)
    params = config_of(tiny_tree, checkout, tmp_path / "unused").params.model_dump(mode="json")
    params["data"] = {
        **params["data"],
        "source": "folder",
        "path": "data/raw",
        "subset": [],
        "text_encoder": "label",
    }
    YAML(typ="safe").dump(params, checkout / "params.yaml")
    (checkout / "infra/compute").mkdir(parents=True)
    (checkout / "infra/compute/cluster.yaml").write_text(f"workers: 1\nstorage: {storage}\n")
    environment = {**os.environ, "PATH": PATH, "RAY_API_SERVER_ADDRESS": address}
    submit = printed("ray job submit")
    assert submit.endswith("python -m stages.pretrain")
    for command in (submit.replace("pretrain", "prepare"), submit):
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
        )
        assert "succeeded" in done.stdout, done.stdout + done.stderr
    meta = artifacts.verify_directory(storage / "data/prepared")["meta"]
    assert meta["counts"]["n_ok"] == 40
    assert list((storage / "runs/prepare/cache").rglob("images-*"))
    artifacts.verify_directory(storage / "models/core")
    assert (storage / "reports/pretrain/samples.png").is_file()
    assert (storage / "mlflow.db").is_file()
    assert not (checkout / "models").exists()


def test_the_printed_command_leaves_a_token_that_nobody_else_can_read(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = printed("(umask 077; ray get-auth-token").partition("#")[0]
    subprocess.run(command, shell=True, check=True, env={**kept, "PATH": PATH, "HOME": str(tmp_path)})
    token = tmp_path / ".ray/auth_token"
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0


def test_no_cluster_is_one_line(tiny_tree: dict[str, Any], tiny_root: Path, tmp_path: Path) -> None:
    profile = ComputeProfile(workers=1, address=f"http://127.0.0.1:{free_port()}", storage=str(tmp_path))
    config = config_of(tiny_tree, tiny_root, tmp_path / "run")
    with pytest.raises(StorageError, match="no Ray cluster accepts jobs") as caught:
        jobs.run_as_job("pretrain", pretrain.pretrain, config, profile, ["data/prepared"])
    assert "\n" not in str(caught.value)


# --- Against a client that answers as it is told.


@dataclass
class FakeClient:
    """Answers of `get_job_info` in order, the last one again and again; an exception is raised."""

    answers: list[Any]
    logs: str = ""
    submitted: list[set[str]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def get_job_info(self, _: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return SimpleNamespace(status=answer, message="the entrypoint\nwas not found")

    def get_job_logs(self, _: str) -> str:
        return self.logs

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)
        raise ConnectionError("gone")

    def submit_job(self, runtime_env: dict[str, Any], **_: object) -> str:
        package = Path(runtime_env["working_dir"])
        self.submitted.append({str(path.relative_to(package)) for path in package.rglob("*")})
        return "job-1"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)


BLIPS = [ConnectionError("refused"), RuntimeError("Request failed with status code 502")]


def test_the_client_waits_through_a_blip_and_says_so(
    impatient: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running, done = JobStatus.RUNNING, JobStatus.SUCCEEDED
    jobs._wait_for(FakeClient([running, *BLIPS, running, *BLIPS, done]), "job-1", "pretrain", tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == 2 * [
        "pretrain: the cluster does not answer, the job trains on",
        "pretrain: the cluster answers again",
    ]


def test_a_cluster_that_stays_away_is_one_line_and_the_job_may_be_joined(
    impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "UNREACHABLE_SECONDS", 0.0)
    with pytest.raises(Busy, match=r"E-BUSY-032 .* run the same command again to join it"):
        jobs._wait_for(FakeClient([BLIPS[0]]), "job-1", "pretrain", tmp_path)


@pytest.mark.parametrize(
    ("logs", "end"), [("", "it logged nothing"), ("Traceback\n", "its log is .*job.log")]
)
def test_a_job_that_failed_says_why_and_where_its_log_is(
    impatient: None, tmp_path: Path, logs: str, end: str
) -> None:
    client = FakeClient([JobStatus.FAILED], logs)
    with pytest.raises(Busy, match=rf"ended as FAILED: the entrypoint\\nwas not found \({end}") as caught:
        jobs._wait_for(client, "job-1", "pretrain", tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "job.log").is_file() == bool(logs)


def test_a_job_that_cannot_be_stopped_is_named(
    impatient: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        jobs._wait_for(client, "job-1", "pretrain", tmp_path)
    assert client.stopped == ["job-1"]
    assert "job-1 could not be stopped and may train on" in capsys.readouterr().err


def test_a_cluster_that_has_just_started_is_waited_for(
    impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[RuntimeError | str] = [RuntimeError("status code 500: No agent"), *BLIPS[1:], "job-1"]
    monkeypatch.setattr(jobs, "_running_job", lambda *_: None)

    def submit(*_: object) -> str:
        answer = answers.pop(0)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr(jobs, "_submit", submit)
    assert jobs._start(None, "pretrain", tmp_path, tmp_path) == "job-1"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "pretrain: the cluster takes no jobs yet, waiting for it (status code 500: No agent)"
    answers = [RuntimeError("Request failed with status code 401: no token")]
    with pytest.raises(RuntimeError, match="401"):
        jobs._start(None, "pretrain", tmp_path, tmp_path)


def test_a_worker_has_the_name_of_its_module_even_where_that_is_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert jobs.name_of(pretrain.pretrain) == "pipeline.workers.pretrain:pretrain"
    spec = importlib.util.find_spec("stages.refine")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.train.__module__ = "__main__"  # as `python -m stages.refine` has it
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert jobs.name_of(program.train) == "stages.refine:train"


def test_nothing_but_code_leaves_the_checkout(checkout: Path, tmp_path: Path) -> None:
    for name in (".env.local", ".netrc", "id_rsa", "deploy.key", "train.log"):
        (checkout / name).write_text("secret")
    client = FakeClient([JobStatus.SUCCEEDED])
    assert jobs._submit(client, checkout, tmp_path / "run") == "job-1"
    (names,) = client.submitted
    assert {Path(name).parts[0] for name in names} == {"pipeline", "stages"}
    assert "stages/job.py" in names and not any("__pycache__" in name for name in names)


def test_inputs_reach_the_shared_storage_once_a_digest(project: Path, tmp_path: Path) -> None:
    storage, run_dir = tmp_path / "nfs", tmp_path / "nfs/runs/toy/1"
    for _ in range(2):
        view = jobs.share_inputs(project, storage, run_dir, ["data/in"])
    assert (view / "data/in/x").read_text() == "1"
    assert len(list((storage / "inputs").iterdir())) == 1
