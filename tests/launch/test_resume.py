"""A worker killed under Ray changes nothing: its last checkpoint is byte for byte that of an unbroken run.

The unbroken runs are trained in this process. The killed ones are trained by two workers, all within one session of
Ray, and lay out snapshots to judge, which must change nothing either.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts
from pipeline.compute import ComputeProfile
from pipeline.config.params import parse_params
from pipeline.launch import execution, failures
from pipeline.launch.session import Session, ray_session
from pipeline.launch.worker import Worker, WorkerConfig
from pipeline.workers import finetune, pretrain, refine
from tests.conftest import write_prepared

pytestmark = pytest.mark.slow

# Two workers, or three where there are cores for them, one of which has no shard to train on.
ELASTIC = ComputeProfile(workers=(1, 3), max_failures=2)
WORKERS = {"pretrain": pretrain.pretrain, "finetune": finetune.finetune, "refine": refine.refine}


@dataclass(frozen=True)
class Killed:
    """A worker that dies at every failpoint, once each; sent to Ray by value, so that only its run has them."""

    worker: Worker
    failpoints: tuple[str, ...]
    marks: Path

    def __call__(self, config: WorkerConfig) -> None:
        for failpoint in self.failpoints:
            if not (mark := self.marks / failpoint).exists():
                os.environ.update(CRESCENDO_FAILPOINT=failpoint, CRESCENDO_FAILPOINT_FILE=str(mark))
                break
        self.worker(config)


def config_of(stage: str, tree: dict[str, Any], root: Path, run_dir: Path, watch: int = 0) -> WorkerConfig:
    """What a worker gets; 32 images (in each of two rounds of finetune and refine), a checkpoint every 16."""
    params = {**tree, stage: {**tree[stage], "num_images": 32, "sample_images": 32}}
    run_dir.mkdir(parents=True)
    return WorkerConfig(parse_params(params), root, run_dir, precision="float32", watch_images=watch)


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of the newest checkpoint's state and of the finished model."""
    last = run_dir / "to-32"  # the second round of finetune and refine
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
    """Tiny parameters with two octaves, where the kernel distance selects the refined state."""
    changes: dict[str, dict[str, Any]] = {
        "data": {"resolution": 32},
        "shell": {"channels": [16, 8]},
        "refine": {"select_by": "kid", "check_images": 8, "min_spread": 0.0},
    }
    return tiny_tree | {name: tiny_tree[name] | changed for name, changed in changes.items()}


@pytest.fixture(scope="module")
def root(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 32 px, and every stage trained without a break in `root/STAGE`; models/ for the next stage."""
    base = tmp_path_factory.mktemp("unbroken")
    write_prepared(base / "data/prepared", resolution=32)
    for stage, model in (("pretrain", "core"), ("finetune", "finetuned"), ("refine", "refined")):
        WORKERS[stage](config_of(stage, tree, base, base / stage))
        artifacts.copy_into_place(base / stage / "result/model", base / "models" / model)
    return base


@pytest.fixture(scope="module")
def ray_of_two(root: Path) -> Iterator[Session]:
    """One session of Ray for all tests of this module."""
    with ray_session(2, root) as session:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Workers cannot import a test.
        yield session


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stage", "failpoints"),
    [
        ("pretrain", ("step:24",)),  # after the first checkpoint, which is at 16
        ("finetune", ("step:56",)),  # in the second octave
        # Before the first checkpoint, when the discriminator has taken its step and the generator has not; then in
        # the second round.
        ("refine", ("discriminator:8", "step:40")),
    ],
)
def test_a_killed_run_ends_in_the_same_bytes(
    stage: str,
    failpoints: tuple[str, ...],
    root: Path,
    tree: dict[str, Any],
    ray_of_two: Session,
    tmp_path: Path,
) -> None:
    config = config_of(stage, tree, root, tmp_path / "run", watch=8)
    execution.train_under_ray(
        ray_of_two, stage, Killed(WORKERS[stage], failpoints, tmp_path), config, ELASTIC
    )
    failures.raise_failure(tmp_path / "run")
    assert all((tmp_path / failpoint).exists() for failpoint in failpoints)
    assert digests(tmp_path / "run") == digests(root / stage)
    assert len(list((tmp_path / "run/watch").glob("nimg-*"))) == 2
