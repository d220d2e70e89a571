"""A worker killed under Ray changes nothing: the final checkpoint is byte for byte the unbroken run's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts
from pipeline.compute import ComputeProfile
from pipeline.config.params import parse_params
from pipeline.launch import execution, failures
from pipeline.launch.worker import WorkerConfig
from pipeline.workers import finetune, pretrain, refine
from tests.conftest import write_prepared

pytestmark = pytest.mark.slow

TWO = ComputeProfile(workers=2, max_failures=2)
WORKERS = {"pretrain": pretrain.pretrain, "finetune": finetune.finetune, "refine": refine.refine}


def config_of(stage: str, tree: dict[str, Any], root: Path, run_dir: Path) -> WorkerConfig:
    """What a worker gets; 32 images (in finetune of each of two octaves), a checkpoint every 16."""
    params = {**tree, stage: {**tree[stage], "num_images": 32, "sample_images": 32}}
    run_dir.mkdir(parents=True)
    return WorkerConfig(parse_params(params), root, run_dir, precision="float32", threads=1)


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of the newest checkpoint's state and of the finished model."""
    last = run_dir / "to-32"  # the second octave of finetune
    newest = artifacts.latest_valid((last if last.exists() else run_dir) / "checkpoints", "nimg-")
    assert newest is not None
    assert newest.name == f"nimg-{32:012d}"
    artifacts.verify_directory(run_dir / "result")
    return {
        "state": artifacts.sha256_file(newest / "state.safetensors"),
        "model": artifacts.sha256_file(run_dir / "result/model/model.safetensors"),
        "curves": artifacts.sha256_file(run_dir / "result/reports/curves.csv"),
    }


@pytest.fixture(scope="module")
def tree(tiny_tree: dict[str, Any]) -> dict[str, Any]:
    """Tiny parameters with two octaves."""
    changes: dict[str, dict[str, Any]] = {"data": {"resolution": 32}, "shell": {"channels": [16, 8]}}
    return tiny_tree | {name: tiny_tree[name] | changed for name, changed in changes.items()}


@pytest.fixture(scope="module")
def trained_root(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 32 px with models/core and models/finetuned, for refine; in this process."""
    base = tmp_path_factory.mktemp("trained")
    write_prepared(base / "data/prepared", resolution=32)
    for stage, model in (("pretrain", "core"), ("finetune", "finetuned")):
        WORKERS[stage](config_of(stage, tree, base, base / stage))
        artifacts.copy_into_place(base / stage / "result/model", base / "models" / model)
    return base


@pytest.fixture(scope="module")
def unbroken(
    trained_root: Path, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """Digests of runs that nobody killed."""
    answers = {}
    with execution.ray_session(2, inside_job=False):
        for stage in WORKERS:
            config = config_of(stage, tree, trained_root, tmp_path_factory.mktemp("whole") / stage)
            execution.train_under_ray(stage, WORKERS[stage], config, TWO)
            failures.raise_failure(config.run_dir)
            answers[stage] = digests(config.run_dir)
    return answers


@pytest.fixture()
def failpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """Arms a failpoint before Ray starts, since its workers inherit our environment; yields its mark."""
    mark = tmp_path / "failed"
    monkeypatch.setenv("CRESCENDO_FAILPOINT", request.param)
    monkeypatch.setenv("CRESCENDO_FAILPOINT_FILE", str(mark))
    yield mark


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stage", "failpoint"),
    [
        ("pretrain", "step:8"),  # before the first checkpoint, which is at 16
        ("pretrain", "step:24"),  # between two
        ("finetune", "step:56"),  # in the second octave
        ("refine", "step:8"),
        ("refine", "discriminator:24"),  # the discriminator has learned, the generator has not
    ],
    indirect=["failpoint"],
)
def test_a_killed_run_ends_in_the_same_bytes(
    stage: str,
    failpoint: Path,
    unbroken: dict[str, dict[str, str]],
    trained_root: Path,
    tree: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = config_of(stage, tree, trained_root, tmp_path / "run")
    execution.execute(stage, WORKERS[stage], config, TWO)
    assert failpoint.exists()
    assert digests(tmp_path / "run") == unbroken[stage]
