"""Judging snapshots while a worker trains: numbers arrive once, and no judge can stop training."""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import judging
from pipeline.launch.judging import Judge, Judging

# A judge that keeps the protocol: numbers in scores.jsonl, and the pictures.
JUDGE = """
import json, pathlib, sys, time
snapshot = pathlib.Path(sys.argv[2])
assert (snapshot / "model").read_text() == snapshot.name
folder, nimg = snapshot.parent, int(snapshot.name[5:])
for name in ("watch.png", "watch.csv"):
    (folder / name).write_text(str(nimg))
with open(folder / "scores.jsonl", "a") as file:
    file.write(json.dumps({"nimg": nimg, "time": time.time(), "metrics": {"watch/kid": 1 / nimg}}) + "\\n")
"""


class Tracker:
    """What a stage logs."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.artifacts: set[str] = set()

    def log_batch(self, records: list[Mapping[str, Any]]) -> None:
        self.records += records

    def log_artifact(self, path: Path, folder: str) -> None:
        self.artifacts.add(f"{folder}/{path.name}")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for snapshots many times a second."""
    monkeypatch.setattr(judging, "POLL_SECONDS", 0.02)


@pytest.fixture()
def run_dir(tmp_path: Path) -> Path:
    """A run folder that has trained for 40 images, as `runs/STAGE/FINGERPRINT`."""
    folder = tmp_path / "runs/toy/0123"
    folder.mkdir(parents=True)
    (folder / "progress.jsonl").write_text(json.dumps({"nimg": 40, "time": 1.0, "metrics": {}}) + "\n")
    return folder


def watched(run_dir: Path, code: str = JUDGE, tracker: Tracker | None = None) -> Judging:
    judge = Judge(10, ("-c", code))
    return Judging("toy", run_dir, run_dir, judge, tracker or Tracker())  # type: ignore[arg-type]


def lay_out(run_dir: Path, *moments: int) -> None:
    """Snapshots, each committed as a whole."""
    for nimg in moments:
        name = f"nimg-{nimg:012d}"
        (run_dir / "new").mkdir()
        (run_dir / "new/model").write_text(name)
        (run_dir / "watch").mkdir(exist_ok=True)
        (run_dir / "new").rename(run_dir / "watch" / name)


def waiting(run_dir: Path) -> Iterator[Path]:
    return (run_dir / "watch").glob("nimg-*")


def wait_until_judged(run_dir: Path) -> None:
    end = time.monotonic() + 20
    while any(waiting(run_dir)):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_snapshot_is_judged_once_and_its_numbers_arrive(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker()
    with watched(run_dir, tracker=tracker):
        lay_out(run_dir, 10)
        wait_until_judged(run_dir)
        lay_out(run_dir, 20)
    assert [(r["nimg"], r["metrics"]) for r in tracker.records] == [
        (10, {"watch/kid": 0.1}),
        (20, {"watch/kid": 0.05}),
    ]
    assert tracker.artifacts == {"watch/watch.png", "watch/watch.csv"}
    assert (run_dir.parent / "watch.png").read_text() == "20"
    # A resumed run lays out what was judged before, too.
    resumed = Tracker()
    lay_out(run_dir, 20, 30, 40)
    with watched(run_dir, tracker=resumed):
        wait_until_judged(run_dir)
    assert resumed.records[:2] == tracker.records, "the same times, by which the tracker knows them"
    assert [r["nimg"] for r in resumed.records] == [10, 20, 40]
    missed = "toy: 3 of 4 snapshots judged (0 failed, 1 overtaken or late)"
    assert f"{missed}; see {run_dir.parent}/watch.png\n" in capsys.readouterr().err
    assert not list(waiting(run_dir))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('broken')", "ValueError: broken"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
        ("", "FileNotFoundError"),  # It ends well, but leaves no pictures.
    ],
)
def test_a_judge_that_fails_or_dies_is_reported_in_one_line(
    run_dir: Path, code: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched(run_dir, code):
        lay_out(run_dir, 40)
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: toy: not judged: ") and reason in warning
    assert summary == "toy: 0 of 4 snapshots judged (1 failed, 3 overtaken or late)"


def test_a_judge_that_cannot_start_is_reported_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging, "NICE", (str(run_dir / "absent"),))
    with watched(run_dir):
        lay_out(run_dir, 40)
        wait_until_judged(run_dir)
        time.sleep(0.1)
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: toy: not judged: nimg-000000000040: [Errno 2] ")
    assert summary == "toy: 0 of 4 snapshots judged (1 failed, 3 overtaken or late)"


def test_a_judge_that_hangs_is_stopped_soon_after_training(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging, "LAST_SECONDS", 0.3)
    started = time.monotonic()
    with watched(run_dir, "import time; time.sleep(60)") as stage:
        lay_out(run_dir, 40)
    assert time.monotonic() - started < 10
    assert stage._process is not None and stage._process.poll() is not None
    missed = "toy: 0 of 4 snapshots judged (0 failed, 4 overtaken or late)\n"
    assert capsys.readouterr().err == missed


def test_an_interrupted_stage_ends_at_once_and_keeps_what_is_not_judged(run_dir: Path) -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with watched(run_dir, "import time; time.sleep(60)"):
            lay_out(run_dir, 40)
            raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    assert len(list(waiting(run_dir))) == 1


def test_a_judge_has_low_priority_from_its_start_and_no_gpu(run_dir: Path) -> None:
    code = "import os, sys; sys.exit(str([os.nice(0), os.environ['CUDA_VISIBLE_DEVICES']]))"
    with watched(run_dir, code):
        lay_out(run_dir, 40)
    assert (run_dir / "watch/judge.log").read_text() == f"{[min(os.nice(0) + 10, 19), '']}\n"


def test_nothing_happens_without_an_interval(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, before = threading.active_count(), os.listdir(run_dir)
    with Judging("toy", run_dir, run_dir, Judge(0), Tracker()):  # type: ignore[arg-type]
        assert threading.active_count() == threads
    assert (os.listdir(run_dir), capsys.readouterr().err) == (before, "")


def test_a_finished_stage_waits_for_the_last_judge_without_work(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "POLL_SECONDS", 0.2)
    with watched(run_dir, "import time; time.sleep(1);" + JUDGE) as stage:
        lay_out(run_dir, 10)
        polls, poll = [], stage._poll
        monkeypatch.setattr(stage, "_poll", lambda: polls.append(1) or poll())
    assert len(polls) < 20, "a busy loop takes the core that the judge needs"
    assert not any(waiting(run_dir))
