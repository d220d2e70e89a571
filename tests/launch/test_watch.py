"""Following a run folder: every record once, to the terminal and to the tracker."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import watch
from tests.launch.toy import config_of, toy


def test_the_tail_returns_every_whole_record_once_even_when_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = watch.Tail(path)
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


def test_progress_reaches_the_terminal_and_the_tracker_once(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.records: list[Any] = []

        def log_batch(self, records: list[Any]) -> None:
            self.records += records

    tracker, out = Tracker(), io.StringIO()
    with watch.ProgressWatch("toy", tmp_path, tracker, out):  # type: ignore[arg-type]
        toy(config_of(tmp_path))
    assert [record["nimg"] for record in tracker.records] == [1, 2, 3, 4, 5]
    assert "toy 5/5 images" in out.getvalue()


def test_a_damaged_line_does_not_stop_the_tail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "progress.jsonl"
    lines = [json.dumps({"nimg": n, "time": n / 10, "metrics": {}}) for n in range(2)]
    path.write_bytes(b"\n".join([lines[0].encode(), b"\xff{", b"null", lines[1].encode(), b""]))
    assert [record["nimg"] for record in watch.Tail(path).read()] == [0, 1]
    assert capsys.readouterr().err == f"warning: {path}: 2 damaged lines are left out\n"


def test_what_other_processes_say_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(folder: Path, pid: int, text: str) -> None:
        folder.mkdir(exist_ok=True)
        record = {"nimg": 8, "time": time.time() + 1, "pid": pid, "text": text}
        with open(folder / "notices.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    with watch.ProgressWatch("toy", tmp_path, None, io.StringIO()):  # type: ignore[arg-type]
        say(tmp_path, os.getpid(), "printed here")
        say(tmp_path, 1, "a step is\nskipped")
        say(tmp_path / "to-32", 1, "a checkpoint is damaged")
    err = capsys.readouterr().err
    assert err == "warning: a step is\\nskipped\nwarning: a checkpoint is damaged\n"
