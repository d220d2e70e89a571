"""A state that is sharded over workers: bits, files and skipped steps of one that is not, in less memory."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.adversarial.guards import guard_tensors, roll_back
from pipeline.artifacts import sha256_file
from pipeline.diffusion.ema import power_decay
from pipeline.models.layers import MPConv
from pipeline.rng import generator_for
from pipeline.training import checkpoint
from pipeline.training.averages import Averages
from pipeline.training.distributed import Slices, local_shards, rank_and_size, sum_over_shards
from pipeline.training.faults import Faults
from pipeline.training.first_averages import EarlyWeights
from pipeline.training.fit import Hook, fit
from pipeline.training.gradients import GradientSum
from pipeline.training.hooks import Checkpoints
from pipeline.training.state import Learner, TrainState

BATCH, SHARDS, CHECKPOINT, IMAGES = 4, 4, 12, 48
NUMBERS = 3 * 60 + 60 * 5 + 5 * 2 + 2  # filters of 3 and of 60, the slices' ends within some of them


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Forked processes have no thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(sharded: bool) -> tuple[TrainState, EarlyWeights]:
    torch.manual_seed(0)
    module = nn.Sequential(MPConv(3, 60, 0), MPConv(60, 5, 0), nn.Linear(5, 2))
    decays = {"0.1": partial(power_decay, 0.1), "0.2": partial(power_decay, 0.2)}
    learner = Learner(module, (0.9, 0.99), decays, sharded)
    early = EarlyWeights({"": learner}, 20, BATCH)
    return TrainState({"net": learner}, extra=early.tensors(), slices=early.slices()), early


def step(bad: dict[int, str], state: TrainState) -> dict[str, Tensor]:
    """An update; at a bad image the last worker's own part of a tensor of the state gets a NaN."""
    learner, losses, gradients = state.learners["net"], [], GradientSum([state.learners["net"]])
    for shard in local_shards(SHARDS):
        gradients.begin_shard()
        x = torch.randn(BATCH // SHARDS, 3, generator=generator_for(0, "x", state.nimg, shard))
        loss = learner.module(x).square().mean()
        loss.backward()
        losses.append(loss.detach())
    rank, size = rank_and_size()
    if state.nimg in bad and rank == size - 1:
        learner.tensors()[bad[state.nimg]][-1] = math.nan
    gradients.finish()
    learner.grad.div_(SHARDS)
    total = sum_over_shards(losses)
    norm = learner.update(0.05, state.nimg, BATCH, total)
    return {"loss": total / SHARDS, "gradient_norm": norm}


def trained(folder: Path, sharded: bool, images: int = IMAGES, bad: dict[int, str] = {}) -> None:
    """Train from the newest checkpoint, if any, with checkpoints, stored averages and early weights."""
    state, early = fresh(sharded)
    checkpoint.resume(folder / "checkpoints", state)
    faults = Faults(folder / "checkpoints", folder, BATCH, 0, lambda nimg: [str(nimg)])
    if state.nimg == 0:
        faults.origin = {name: tensor.clone() for name, tensor in state.learner_tensors().items()}
    saver = Checkpoints(folder / "checkpoints", CHECKPOINT, BATCH, IMAGES, faults, lambda: None)
    averages = Averages(folder / "averages", state.learners["net"], [24, 48])
    norms: list[float] = []

    def record(state: TrainState, metrics: dict[str, Tensor]) -> None:
        norms.append(float(metrics["gradient_norm"]))

    hooks: list[Hook] = [faults, record, averages, early, saver]
    fit(state, partial(step, bad), BATCH, images, hooks)
    faults.settled(state)
    checkpoint.save(folder / "checkpoints", state)
    if rank_and_size()[0] == 0:
        (folder / f"norms-{images}").write_text(str(norms))


def files(folder: Path) -> dict[str, str]:
    """Digests of all that a run leaves but how the process group met."""
    kept = ("checkpoints/*/state.safetensors", "averages/*/averages.safetensors", "norms-*")
    paths = [path for pattern in kept for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


def work(rank: int, size: int, folder: Path, task: Callable[[], object]) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    task()
    dist.destroy_process_group()


def on_workers(size: int, folder: Path, task: Callable[[], object]) -> None:
    folder.mkdir(exist_ok=True)
    mp.start_processes(work, (size, folder, task), nprocs=size, start_method="fork")


def test_two_and_four_workers_leave_the_files_of_one_and_take_over_from_each_other(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    trained(tmp_path / "alone", sharded=True)
    alone = files(tmp_path / "alone")
    assert len(alone) == 2 + 2 + 1
    for size in (2, 4):
        folder = tmp_path / str(size)
        on_workers(size, folder, partial(trained, folder, True))
        assert files(folder) == alone
    changing = tmp_path / "changing"
    for size, sharded, images in ((4, True, 16), (2, False, 28), (2, True, 40)):
        on_workers(size, changing, partial(trained, changing, sharded, images))
        (changing / f"meet-{size}").unlink(missing_ok=True)
    trained(changing, sharded=False)
    last = {name for name in alone if name.endswith("nimg-000000000048/state.safetensors")}
    stored = {name for name in alone if name.startswith("averages/")}
    assert len(last | stored) == 3
    assert all(files(changing)[name] == alone[name] for name in last | stored)


@pytest.mark.parametrize("tensor", ["weights", "adam.exp_avg_sq", "ema.0.2"])
def test_a_slice_that_is_not_finite_is_named_by_the_first_worker_and_replaced(
    tmp_path: Path, tensor: str
) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    alone.mkdir()
    trained(alone, sharded=False, bad={28: tensor})
    on_workers(2, two, partial(trained, two, True, bad={28: tensor}))
    assert files(alone) == files(two)
    assert f"net.{tensor} of the state" in (two / "notices.jsonl").read_text()
    lines = [(folder / "notices.jsonl").read_text().count("\n") for folder in (alone, two)]
    assert lines == [4, 4]


def held(sharded: bool, folder: Path) -> None:
    """Write how many numbers this worker holds in the tensors of a state, its gradient included."""
    state, _ = fresh(sharded)
    numbers = sum(tensor.numel() for tensor in [*state.tensors().values(), state.learners["net"].grad])
    rank, size = rank_and_size()
    (folder / f"{'sharded' if sharded else 'whole'}-{rank}-of-{size}").write_text(str(numbers))


def test_a_worker_holds_one_slice_of_moments_averages_and_early_weights(tmp_path: Path) -> None:
    small = 2 + 1  # counts of faults, Adam's step
    for size in (2, 4):
        for sharded in (False, True):
            folder = tmp_path / f"{size}-{sharded}"
            on_workers(size, folder, partial(held, sharded, tmp_path))

    def numbers(kind: str, size: int) -> list[int]:
        return [int((tmp_path / f"{kind}-{rank}-of-{size}").read_text()) - small for rank in range(size)]

    # Weights, gradient, two moments, two averages, the early weights.
    assert numbers("whole", 2) == [7 * NUMBERS] * 2
    assert numbers("sharded", 2) == [2 * NUMBERS + 5 * part for part in (256, NUMBERS - 256)]
    assert numbers("sharded", 4) == [2 * NUMBERS + 5 * part for part in (128, 128, 128, NUMBERS - 384)]


def go_back(folder: Path) -> None:
    """Train a step of a student of refinement, and return it to the state before."""
    state, _ = fresh(sharded=True)
    learner = state.learners["net"]
    student = TrainState({"generator": learner})
    learner.emas = {"ema": learner.emas["0.1"]}
    learner.decays = {"ema": lambda nimg, batch_size: 0.9}
    student.extra, student.slices = guard_tensors(learner), {"best": learner.slices}
    before = learner.weights.detach().clone()
    step({}, state)
    assert not torch.equal(learner.weights, before)
    roll_back(student)
    assert torch.equal(learner.weights, before) and torch.equal(learner.whole(learner.emas["ema"]), before)
    assert not any(tensor.any() for tensor in learner.moments.values())
    (folder / f"went-{rank_and_size()[0]}").touch()


def test_every_worker_of_a_student_that_goes_back_has_all_of_its_best_weights(tmp_path: Path) -> None:
    on_workers(2, tmp_path, partial(go_back, tmp_path))
    assert (tmp_path / "went-0").exists() and (tmp_path / "went-1").exists()


def exchange(folder: Path) -> None:
    """The last workers of four have no slice of a short vector; slices are gathered in pieces of five."""
    slices, rank = Slices(100, sharded=True), rank_and_size()[0]
    assert [place.stop - place.start for place in slices.places] == [64, 36, 0, 0]
    expected = torch.arange(100.0)
    vector = torch.zeros(100)
    vector[slices.own] = expected[slices.own]
    assert torch.equal(slices.whole(expected[slices.own]), expected)
    slices.exchange_(vector)
    assert torch.equal(vector, expected)
    (folder / f"equal-{rank}").touch()


def test_a_vector_too_short_for_all_workers_is_exchanged_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.distributed.CHUNK", 5)
    on_workers(4, tmp_path, partial(exchange, tmp_path))
    assert len(list(tmp_path.glob("equal-*"))) == 4
