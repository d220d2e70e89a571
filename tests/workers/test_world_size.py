"""Every stage ends with the same bits on one, two and four workers, whose state is sharded or not: sums run over
shards, in their order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import artifacts
from pipeline.adversarial import octaves
from pipeline.config.params import parse_params
from pipeline.launch.worker import Worker, WorkerConfig
from pipeline.training.distributed import Slices, add_in_order, local_shards, sum_over_shards
from pipeline.training.records import read_records
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain
from pipeline.workers.refine import refine
from pipeline.workers.settings import level_settings, train_context
from tests.conftest import write_prepared

IMAGES = {"num_images": 16, "shards": 4, "checkpoint_images": 16, "sample_images": 16}
# Losses of shells reach the levels below, whose gradients therefore have two parts.
GROWTH = {"order": "together", "core": "joint"}
STAGES: dict[str, tuple[Worker, dict[str, Any], str]] = {
    "pretrain": (pretrain, IMAGES, "core"),
    "finetune": (finetune, IMAGES | GROWTH, "finetuned"),
    "refine": (refine, IMAGES, "refined"),
}


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Some batches of samples for each worker to make at the end of refine."""
    with mock.patch.object(octaves, "BATCH", 3):
        yield


@pytest.fixture(scope="module")
def tree(tiny_tree: dict[str, Any]) -> dict[str, Any]:
    """Tiny parameters with two octaves, and batches of eight images in four shards."""
    changed = {name: {**tiny_tree[name], **section} for name, (_, section, _) in STAGES.items()}
    shell = {**tiny_tree["shell"], "channels": [16, 8]}
    return {**tiny_tree, **changed, "shell": shell, "data": {**tiny_tree["data"], "resolution": 32}}


def train(
    stage: str, tree: dict[str, Any], root: Path, workers: int, shard_state: bool = False
) -> dict[str, Any]:
    """Train in `workers` processes; digests of states, models and curves, and all metrics."""
    run_dir = root / "runs" / f"{stage}-{workers}{'-sharded' * shard_state}"
    run_dir.mkdir(parents=True)
    config = WorkerConfig(parse_params(tree), root, run_dir, precision="float32", shard_state=shard_state)
    if workers == 1:
        STAGES[stage][0](config)
    else:
        mp.start_processes(work, (stage, config, workers), nprocs=workers, start_method="fork")
    files = [*run_dir.glob("**/*.safetensors"), run_dir / "result/reports/curves.csv"]
    metrics = [record["metrics"] for record in read_records(run_dir / "progress.jsonl")]
    return {"metrics": metrics} | {
        str(path.relative_to(run_dir)): artifacts.sha256_file(path) for path in files
    }


def work(rank: int, stage: str, config: WorkerConfig, workers: int) -> None:
    dist.init_process_group("gloo", f"file://{config.run_dir}/meet", rank=rank, world_size=workers)
    with mock.patch("pipeline.training.state.Slices", wraps=Slices) as slices:
        STAGES[stage][0](config)
    assert {call.args[1] for call in slices.call_args_list} == {config.shard_state}  # of all learners
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A root with the models that one worker trains, and the digests by stage."""
    root = tmp_path_factory.mktemp("alone")
    write_prepared(root / "data/prepared", resolution=32)
    found = {}
    for stage, (_, _, model) in STAGES.items():
        found[stage] = train(stage, tree, root, 1)
        artifacts.copy_into_place(root / f"runs/{stage}-1/result/model", root / "models" / model)
    return root, found


@pytest.mark.parametrize("shard_state", [False, True])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_workers_trains_the_same_bits_with_and_without_a_sharded_state(
    stage: str, workers: int, shard_state: bool, tree: dict[str, Any], alone: tuple[Path, dict[str, Any]]
) -> None:
    root, found = alone
    assert train(stage, tree, root, workers, shard_state) == found[stage]


def test_the_number_of_threads_is_a_parameter_whatever_the_machine(
    tree: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    params = parse_params({**tree, "pretrain": {**tree["pretrain"], "threads_per_shard": 3}})
    config = WorkerConfig(params, alone[0], tmp_path)
    train_context("pretrain", config, params.pretrain, level_settings(config, params.pretrain))
    assert chosen == [3]


def add(rank: int, folder: Path, size: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    own = [parts()[shard] for shard in local_shards(6)]
    small = sum_over_shards(own)
    add_in_order(own)
    torch.save((small, own[-1]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def parts() -> torch.Tensor:
    """Vectors of six shards, whose sum depends on the order."""
    return (
        torch.randn(6, 7, generator=torch.Generator().manual_seed(0)) * 10 ** torch.arange(-3.0, 3)[:, None]
    )


def test_a_vector_that_no_number_of_workers_divides_is_added_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.distributed.CHUNK", 4)
    mp.start_processes(add, (tmp_path, 3), nprocs=3, start_method="fork")
    total = torch.zeros(7)
    for part in parts():
        total += part
    for rank in range(3):
        assert all(
            torch.equal(each, total) for each in torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        )
