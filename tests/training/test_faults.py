"""Steps that are not finite: skipped alike on all workers, recovered from, and repeated by a resumed run."""

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.artifacts import verify_directory
from pipeline.diffusion.ema import power_decay
from pipeline.errors import ConfigError
from pipeline.models.layers import MPConv
from pipeline.rng import generator_for
from pipeline.training import checkpoint
from pipeline.training.distributed import local_shards, sum_over_shards
from pipeline.training.faults import Faults, Usual
from pipeline.training.fit import fit
from pipeline.training.gradients import GradientSum
from pipeline.training.hooks import Checkpoints, Progress
from pipeline.training.records import read_records
from pipeline.training.state import Learner, TrainState

BATCH, CHECKPOINT, IMAGES = 4, 12, 80
Bad = Mapping[int, str]  # what goes wrong at which image
Captured = pytest.CaptureFixture[str]


class Killed(Exception):
    """In place of SIGKILL."""


def fresh() -> TrainState:
    torch.manual_seed(0)
    module = nn.Sequential(MPConv(3, 6, 0), nn.Linear(6, 2))
    return TrainState({"net": Learner(module, (0.9, 0.99), {"a": partial(power_decay, 0.1)})})


def step(bad: Bad, state: TrainState) -> dict[str, Tensor]:
    """An update from two shards; what is `bad` at this image happens in the last one only."""
    learner, losses = state.learners["net"], []
    gradients = GradientSum([learner])
    for shard in local_shards(2):
        gradients.begin_shard()
        x = torch.randn(BATCH // 2, 3, generator=generator_for(0, "x", state.nimg, shard))
        kind = bad.get(state.nimg) if shard == 1 else None
        if kind == "input":
            x[0, 0] = math.nan
        loss = learner.module(x).square().mean()
        loss.backward()
        if kind == "gradient":
            learner.grad[5] = math.inf
        elif kind == "huge":
            learner.grad[5] = 1e30
        elif kind and "=" in kind:
            name, value = kind.split("=")
            learner.tensors()[name].view(-1)[-1] = float(value)
        losses.append(loss.detach() * {"loss": math.nan, "spike": 1000.0}.get(kind or "", 1.0))
    gradients.finish()
    learner.grad.div_(2)
    total = sum_over_shards(losses)
    norm = learner.update(0.05, state.nimg, BATCH, total)
    return {"loss": total / 2, "gradient_norm": norm}


def samples(nimg: int) -> list[str]:
    return [f"{n} (digest)" for n in range(nimg, nimg + 6)]


def trained(folder: Path, bad: Bad, kill_at: int = -1, images: int = IMAGES) -> TrainState:
    """As TrainContext.train does it; `kill_at` an image, in a step, an earlier run is killed first."""
    if kill_at >= 0:
        with pytest.raises(Killed):
            trained(folder, {**bad, kill_at: "kill"}, images=images)
    state = fresh()
    checkpoint.resume(folder / "checkpoints", state)
    faults = Faults(folder / "checkpoints", folder, BATCH, 0, samples)
    if state.nimg == 0:
        faults.origin = {name: tensor.clone() for name, tensor in state.learner_tensors().items()}

    def step_or_die(state: TrainState) -> dict[str, Tensor]:
        if bad.get(state.nimg) == "kill":
            raise Killed
        return step(bad, state)

    progress = Progress(folder / "progress.jsonl", 4 * BATCH, BATCH, images, state.nimg)
    saver = Checkpoints(folder / "checkpoints", CHECKPOINT, BATCH, images, faults, lambda: None)
    fit(state, step_or_die, BATCH, images, [faults, progress, saver])
    faults.settled(state)
    checkpoint.save(folder / "checkpoints", state)
    return state


def equal(one: TrainState, other: TrainState) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and one.nimg == other.nimg


def finite(state: TrainState) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.tensors().values())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(value: float) -> None:
    state = fresh()
    for state.nimg in (0, 4):
        step({}, state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    own = state.learners["net"]
    own.grad.normal_()[7] = value
    assert not math.isfinite(float(own.update(0.05, 8, BATCH)))
    assert not own.grad.any()
    for name, tensor in state.tensors().items():
        if "adam" in name:
            assert torch.equal(tensor, before[name]), name
        elif "ema" not in name:
            torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-6)  # projected once more
    assert finite(state)
    own.grad.normal_()
    assert math.isfinite(float(own.update(0.05, 12, BATCH))) and not torch.equal(
        own.weights, before["net.weights"]
    )


def test_a_gradient_of_any_size_that_is_accepted_leaves_finite_moments() -> None:
    state = fresh()
    own = state.learners["net"]
    own.grad.fill_(1e18)
    assert math.isfinite(float(own.update(0.05, 0, BATCH))) and finite(state)


@pytest.mark.parametrize("kind", ["input", "loss", "gradient", "huge"])
def test_a_bad_step_is_skipped_and_named_with_its_batch(tmp_path: Path, capsys: Captured, kind: str) -> None:
    state = trained(tmp_path, {16: kind})
    assert finite(state) and state.faults.tolist() == [1, 0] and state.nimg == IMAGES
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: training at image 16: a step is skipped, 1 in a row (")
    assert line.endswith("; batch: 16 (digest), 17 (digest), 18 (digest), 19 (digest) and 2 more")
    (record,) = read_records(tmp_path / "notices.jsonl")
    assert record["nimg"] == 16 and record["samples"] == samples(16)
    means = [record["metrics"] for record in read_records(tmp_path / "progress.jsonl")]
    assert [metrics.get("skipped_steps", 0) for metrics in means] == [0, 1, 0, 0, 0]
    assert all("loss" in metrics for metrics in means)


def test_a_run_without_a_bad_step_says_nothing_and_counts_none(tmp_path: Path, capsys: Captured) -> None:
    state = trained(tmp_path, {})
    assert state.faults.tolist() == [0, 0] and capsys.readouterr().err == ""
    assert not (tmp_path / "notices.jsonl").exists()


@pytest.mark.parametrize("kill_at", [0, 16, 20, 24, 28, 32, 36, 44])
@pytest.mark.parametrize(
    "bad",
    [
        {20: "input"},  # a checkpoint is due right after it, and is not written
        {16: "loss", 20: "huge"},
        {16: "loss", 20: "gradient", 24: "input"},  # three in a row, with a checkpoint due after the second
        {24: "input", 28: "input", 32: "input"},
    ],
)
def test_a_run_killed_around_a_skipped_step_ends_with_the_same_bits(
    tmp_path: Path, bad: Bad, kill_at: int
) -> None:
    whole = trained(tmp_path / "whole", bad)
    assert whole.faults.tolist() == [len(bad), int(len(bad) == 3)]
    assert equal(whole, trained(tmp_path / "killed", bad, kill_at))
    assert not equal(whole, trained(tmp_path / "plain", {}))


def test_after_three_in_a_row_the_learners_go_back_and_the_clock_goes_on(
    tmp_path: Path, capsys: Captured
) -> None:
    bad = {28: "input", 32: "loss", 36: "gradient"}
    trained(tmp_path / "until", bad, images=24)  # its last checkpoint is the one to go back to
    then = TrainState(fresh().learners)
    checkpoint.resume(tmp_path / "until/checkpoints", then)
    # The third bad step is known one step later.
    state = trained(tmp_path / "run", bad, images=44)
    assert state.nimg == 44 and state.faults.tolist() == [3, 1]
    assert all(
        torch.equal(tensor, then.learner_tensors()[name]) for name, tensor in state.learner_tensors().items()
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "training at image 36: the state goes back to image 24; 20 images are without effect (return 1 of 5)"
        in line
    )


def test_before_the_first_checkpoint_they_go_back_to_the_start(tmp_path: Path) -> None:
    state = trained(tmp_path, row(0), images=12)
    assert state.faults.tolist() == [3, 1]
    assert torch.equal(state.learners["net"].weights, fresh().learners["net"].weights)


@pytest.mark.parametrize("tensor", ["weights", "adam.exp_avg", "adam.exp_avg_sq", "adam.step", "ema.a"])
@pytest.mark.parametrize(("at", "value"), [(12, math.nan), (28, math.inf), (28, -math.inf)])
def test_a_state_that_was_corrupted_is_named_and_replaced_by_an_earlier_one(
    tmp_path: Path, capsys: Captured, tensor: str, at: int, value: float
) -> None:
    state = trained(tmp_path, {at: f"{tensor}={value}"})
    assert finite(state) and state.faults.tolist() == [3, 1]
    assert f", net.{tensor} of the state" in capsys.readouterr().err
    for path in (tmp_path / "checkpoints").iterdir():
        verify_directory(path)
        checkpoint.check(path)


def row(start: int) -> dict[int, str]:
    return dict.fromkeys(range(start, start + 3 * BATCH, BATCH), "input")


def test_after_five_returns_training_stops_and_names_the_batch(tmp_path: Path, capsys: Captured) -> None:
    rows = [row(start) for start in range(16, 16 + 6 * 24, 24)]
    five = {nimg: kind for each in rows[:5] for nimg, kind in each.items()}
    state = trained(tmp_path / "five", five, images=200)
    assert finite(state) and state.faults.tolist() == [15, 5]
    with pytest.raises(ConfigError) as error:
        trained(tmp_path / "six", {**five, **rows[5]}, kill_at=60, images=200)
    assert str(error.value) == (
        "E-CFG-026 training at image 144: 3 steps in a row are not finite, after 5 returns to earlier states. "
        "Fix: lower the learning rate, or look at the batch: 144 (digest), 145 (digest), 146 (digest), "
        "147 (digest) and 2 more"
    )
    assert sorted(path.name[-3:] for path in (tmp_path / "six/checkpoints").iterdir()) == ["108", "132"]
    again = capsys.readouterr().err.count("the state goes back")
    assert again == 5 + 5  # the killed run and the one that went on remember their returns


def test_no_checkpoint_is_written_within_a_row_of_skipped_steps(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, {20: "input", 24: "kill"})
    assert [path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()] == ["12"]


def test_a_loss_spike_is_named_with_its_batch_and_changes_nothing(tmp_path: Path, capsys: Captured) -> None:
    state = trained(tmp_path / "spike", {240: "spike"}, images=320)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: training at image 240: loss is ") and "batch: 240 (digest)" in line
    assert equal(state, trained(tmp_path / "plain", {}, images=320))


def test_the_usual_range_follows_a_falling_loss_without_alarm() -> None:
    usual = Usual()
    assert usual.is_spike(math.nan)
    noise = torch.randn(2000, generator=generator_for(0, "noise")).tolist()
    losses = [math.exp(-i / 500) * (1 + 0.2 * each) for i, each in enumerate(noise)]
    assert not any(map(usual.is_spike, losses))
    assert usual.is_spike(100 * losses[-1]) and usual.is_spike(math.nan) and math.isfinite(usual.mean)


def work(rank: int, folder: Path, bad: Bad) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    state = trained(folder, bad)
    torch.save(state.tensors(), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Forked processes have no thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("bad", [{20: "input"}, row(24), {28: "weights=nan"}, {28: "ema.a=inf"}])
def test_two_workers_skip_alike_and_end_with_the_bits_of_one(tmp_path: Path, bad: Bad) -> None:
    """The bad shard, or the corrupted state, is that of the second worker."""
    mp.start_processes(work, (tmp_path, bad), nprocs=2, start_method="fork")
    alone = trained(tmp_path / "alone", bad).tensors()
    for rank in range(2):
        own = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert all(torch.equal(own[name], tensor) for name, tensor in alone.items())
    lines = (tmp_path / "notices.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["text"] for line in lines})  # said by one of them
