"""Checkpoints: none that is damaged or not finite is written or used, and each that is passed over is named."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import artifacts
from pipeline.diffusion.ema import power_decay
from pipeline.errors import StorageError
from pipeline.training import checkpoint
from pipeline.training.context import GrowthRound
from pipeline.training.state import Learner, TrainState

Captured = pytest.CaptureFixture[str]


def fresh(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return TrainState({"net": Learner(nn.Linear(3, 2), (0.9, 0.99), {"a": partial(power_decay, 0.1)})})


def saved(folder: Path, *clocks: int) -> TrainState:
    state = fresh()
    for state.nimg in clocks:
        checkpoint.save(folder, state)
    return state


def test_the_newest_one_that_longer_runs_share_is_kept_beside_the_newest(tmp_path: Path) -> None:
    state = fresh()
    for state.nimg in (8, 16, 24, 32, 40):
        checkpoint.save(tmp_path, state, lambda nimg: nimg <= 16)
    assert sorted(int(path.name[-12:]) for path in tmp_path.iterdir()) == [16, 32, 40]


def test_a_run_that_goes_on_with_other_numerics_says_so_once(tmp_path: Path, capsys: Captured) -> None:
    here, there = ({"precision": p, "device": "AVX512", "torch": "2.15"} for p in ("bfloat16", "float32"))
    state = fresh()
    state.nimg = 4
    checkpoint.save(tmp_path, state, numerics=here)
    for same in (here, here | {"compile": "false"}, {}):
        checkpoint.resume(tmp_path, fresh(), same)
    assert capsys.readouterr().err == ""
    checkpoint.resume(tmp_path, fresh(), there)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/nimg-000000000004: precision is float32, was bfloat16; the last bits may differ from "
        "those of an unbroken run\n"
    )


def file_of(folder: Path, nimg: int) -> Path:
    return folder / f"nimg-{nimg:012d}" / "state.safetensors"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def rewritten(file: Path, write: Callable[[Path], None]) -> None:
    """Another file with a manifest that fits, as a faulty program would leave it."""
    with artifacts.commit_directory(file.parent, {"nimg": int(file.parent.name[-12:])}) as folder:
        write(folder / file.name)


def not_finite(file: Path) -> None:
    tensors = load_file(file)
    tensors["net.ema.a"][3] = math.nan
    rewritten(file, lambda path: save_file(tensors, path))


def no_tensors(file: Path) -> None:
    rewritten(file, lambda path: path.write_bytes(b"x" * 50))


def other_clock(file: Path) -> None:
    artifacts.remove(file.parent)
    older = file.parents[1] / "nimg-000000000004"
    older.rename(file.parent)
    saved(file.parents[1], 4)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flip": (flip, "E-IO-018 {}/state.safetensors: has sha256 "),
    "cut": (cut, "E-IO-017 {}/state.safetensors: has 100 bytes, expected "),
    "missing": (Path.unlink, "E-IO-015 {}/state.safetensors: is missing"),
    "manifest": (lambda file: (file.parent / "manifest.json").unlink(), "E-IO-011 {}: has no manifest.json"),
    "not finite": (
        not_finite,
        "E-IO-023 {}/state.safetensors: 1 of 8 values of tensor net.ema.a are not finite",
    ),
    "no tensors": (no_tensors, "E-IO-025 {}/state.safetensors: cannot be read ("),
    "other clock": (other_clock, "E-IO-024 {}: holds the checkpoint at image 4"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_of_no_use_is_named_in_one_line_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "checkpoints"
    saved(folder, 4, 8)
    damage, problem = DAMAGES[kind]
    damage(file_of(folder, 8))
    state = fresh(3)
    checkpoint.resume(folder, state)
    assert state.nimg == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: " + problem.format(folder / "nimg-000000000008"))
    assert line.endswith(
        f"; the checkpoint is moved to {folder}/quarantine; nimg-000000000004 is used instead; "
        "training starts again from image 4, and 4 images are trained again"
    )
    assert len(list((folder / "quarantine").glob("nimg-000000000008-*.reason.txt"))) == 1
    (record,) = (json.loads(each) for each in (tmp_path / "notices.jsonl").read_text().splitlines())
    assert f"warning: {record['text']}" == line and record["nimg"] == 4
    checkpoint.resume(folder, fresh())
    assert capsys.readouterr().err == ""  # said once


def test_where_no_checkpoint_is_left_the_run_says_that_it_starts_again_and_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "checkpoints", 4, 8)
    flip(file_of(tmp_path / "checkpoints", 4))
    cut(file_of(tmp_path / "checkpoints", 8))
    state = fresh(3)
    before = state.learners["net"].weights.clone()
    checkpoint.resume(tmp_path / "checkpoints", state)
    assert state.nimg == 0 and torch.equal(state.learners["net"].weights, before)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("quarantine; ")[2] for line in lines] == [
        f"no other is left; training starts again from image 0, and {n} images are trained again"
        for n in (8, 4)
    ]


def test_a_damaged_result_of_a_round_of_growth_is_named_and_not_used(
    tmp_path: Path, capsys: Captured
) -> None:
    growth = GrowthRound(tmp_path / "to-16", start=48)
    assert not growth.finished() and capsys.readouterr().err == ""
    with artifacts.commit_directory(growth.result) as folder:
        (folder / "metrics.json").write_text("{}")
    assert growth.finished()
    (growth.result / "metrics.json").unlink()
    assert not growth.finished()
    assert capsys.readouterr().err == (
        f"warning: E-IO-015 {growth.result}/metrics.json: is missing; this round of growth is finished again\n"
    )


def test_a_folder_that_a_user_put_beside_the_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    artifacts.copy_into_place(tmp_path / "nimg-000000000004", tmp_path / "nimg-backup")
    state = fresh()
    checkpoint.resume(tmp_path, state)
    assert state.nimg == 4


@pytest.mark.parametrize("tensor", ["weights", "adam.exp_avg", "adam.exp_avg_sq", "ema.a"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_checkpoint_holds_a_value_that_is_not_finite(tmp_path: Path, tensor: str, value: float) -> None:
    state = saved(tmp_path, 4)
    state.nimg = 8
    state.tensors()[f"net.{tensor}"][5] = value
    with pytest.raises(StorageError, match=f"1 of 8 values of tensor net.{tensor} are not finite"):
        checkpoint.save(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["nimg-000000000004"]
    checkpoint.resume(tmp_path, state)
    assert state.nimg == 4 and all(torch.isfinite(each).all() for each in state.tensors().values())


def test_a_sum_that_overflows_is_still_finite(tmp_path: Path) -> None:
    state = fresh()
    state.tensors()["net.ema.a"].fill_(3e38)
    checkpoint.save(tmp_path, state)
    assert file_of(tmp_path, 0).exists()


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    saved(tmp_path, 4, 8, 12)
    assert sorted(p.name for p in tmp_path.glob("nimg-*")) == ["nimg-000000000008", "nimg-000000000012"]
