"""progress.jsonl: cut on a resume, read where lines are damaged, and nothing that it loses is lost in silence."""

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.training.hooks import Progress
from pipeline.training.records import read_records
from pipeline.training.state import TrainState

Captured = pytest.CaptureFixture[str]


def test_progress_is_cut_to_the_checkpoint_on_resume(tmp_path: Path) -> None:
    path, state = tmp_path / "progress.jsonl", TrainState({}, nimg=0)
    progress = Progress(path, 8, 4, 100, 0)
    for state.nimg in range(4, 33, 4):
        progress(state, {"loss": torch.tensor(float(state.nimg))})
    with open(path, "a") as file:
        file.write('{"nimg": 36, "tor')
    Progress(path, 8, 4, 100, 16)
    records = read_records(path)
    assert [r["nimg"] for r in records] == [8, 16]
    assert records[1]["metrics"] == {"loss": 14.0}  # mean of the steps since the last record


def test_a_round_that_begins_anew_writes_its_beginning_once(tmp_path: Path) -> None:
    """The record of its beginning has the clock of the end of the round before, which stays."""
    path = tmp_path / "progress.jsonl"
    for _ in range(2):  # killed before the first checkpoint
        Progress(path, 8, 4, 200, 0).write(0, {"score": 3.0})
    Progress(path, 8, 4, 200, 96).write(100, {"score": 2.0})
    for _ in range(2):
        Progress(path, 8, 4, 200, 0, start=100).write(0, {"score": 5.0})
    again = Progress(path, 8, 4, 200, 8, start=100)
    again.write(16, {"score": 4.0})
    scores = [(record["nimg"], record["metrics"]["score"]) for record in read_records(path)]
    assert scores == [(0, 3.0), (100, 2.0), (100, 5.0), (116, 4.0)]


def lines_of(*clocks: int) -> list[bytes]:
    return [json.dumps({"nimg": n, "time": 1.0, "metrics": {"loss": 0.5}}).encode() for n in clocks]


DAMAGED = (
    b'{"nimg": 16, "time": 1.0, "met',
    b"\xff\xfe\x00garbage",
    b"[]",
    b'{"nimg": "16", "time": 1.0, "metrics": {}}',
    b'{"nimg": 16, "metrics": {}}',
    b'{"nimg": 16, "time": 1.0}',
    b'{"nimg": 16, "time": 1.0, "text": 3}',
    b'{"nimg": 16, "time": 1.0, "metrics": {"loss": NaN}}',
    b'{"nimg": 16, "time": 1.0, "metrics": {"loss": "low"}}',
    b'{"nimg": 16, "time": 1.0, "metrics": 3}',
    b"[" * 100_000,
)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_dropped_and_named_with_what_is_lost(
    tmp_path: Path, capsys: Captured, line: bytes
) -> None:
    path = tmp_path / "progress.jsonl"
    first, last = lines_of(8, 24)
    path.write_bytes(b"\n".join([first, line, last, b""]))
    assert [record["nimg"] for record in read_records(path)] == [8, 24]
    Progress(path, 8, 4, 100, 24)
    assert capsys.readouterr().err == (
        f"warning: {path}: damaged line 2 dropped; the metrics that followed image 8 are lost\n"
    )
    assert path.read_bytes().splitlines() == [first, last]


def test_many_damaged_lines_are_counted(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b"\n".join([b"x", *lines_of(8), *[b"y"] * 6, *lines_of(24), b""]))
    Progress(path, 8, 4, 100, 24)
    assert capsys.readouterr().err == (
        f"warning: {path}: 7 damaged lines (1, 3, 4, 5, 6, ...) dropped; "
        "the metrics that followed image 0, 8 are lost\n"
    )


def test_a_line_torn_beyond_the_checkpoint_is_written_again(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b"\n".join([*lines_of(8, 16), b'{"nimg": 24, "ti']))
    Progress(path, 8, 4, 100, 16)
    assert "damaged line 3 dropped; these metrics are beyond image 16" in capsys.readouterr().err
    Progress(path, 8, 4, 100, 16)
    assert capsys.readouterr().err == ""


def test_a_metric_that_is_not_finite_is_left_out_and_named(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "progress.jsonl"
    Progress(path, 8, 4, 100, 0).write(8, {"score": math.nan, "spread": 1.0})
    assert [record["metrics"] for record in read_records(path)] == [{"spread": 1.0}]
    assert capsys.readouterr().err == "warning: at image 8 not recorded: score nan\n"
