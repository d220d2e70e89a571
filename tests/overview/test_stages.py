"""The state of stages: what DVC would run and why, and what their run folders say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.errors import BadData
from pipeline.launch.endings import recorded_ending
from pipeline.launch.history import MADE_FROM
from pipeline.overview.stages import Progress, StageState, stage_states
from pipeline.tracking.stage_run import LEASE

DVC_YAML = """
stages:
  first:
    cmd: cp raw one
    deps: [raw]
    params: [seed, first]
    outs: [one]
  second:
    cmd: cp one two
    deps: [one]
    outs: [two]
"""
HOLD = """
import sys, time
from pipeline.artifacts import lease
with lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
PARAMS = "seed: 0\nfirst: {lr: 0.04, num_images: 48, log_images: 8}\n"


@pytest.fixture()
def root(tmp_path: Path) -> Iterator[Path]:
    """A project of two stages, which have run."""
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "raw").write_text("data")
    Repo.init(str(tmp_path), no_scm=True)
    here = Path.cwd()
    os.chdir(tmp_path)  # where DVC runs the commands of stages
    yield tmp_path
    os.chdir(here)


@pytest.fixture()
def trained(root: Path) -> Path:
    with Repo(str(root)) as repo:
        repo.reproduce()
    return root


def begin_run(root: Path, lr: float = 0.04, records: int = 3) -> Path:
    """The folder of a run of `first` that has come to some images."""
    folder = root / "runs/first/0123"
    folder.mkdir(parents=True)
    params = {"seed": 0, "first": {"lr": lr, "num_images": 48}}
    (folder / MADE_FROM).write_text(json.dumps({"params": params}))
    lines = [
        {"nimg": 8 * i, "total": 48, "time": time.time() - 2 * (records - i), "metrics": {}}
        for i in range(1, records + 1)
    ]
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def states(root: Path) -> dict[str, StageState]:
    return {each.name: each for each in stage_states(root, root / "runs")}


def test_what_has_run_is_fresh_and_what_has_not_is_told_apart(root: Path) -> None:
    assert {name: each.state for name, each in states(root).items()} == {
        "first": "never run",
        "second": "never run",
    }
    with Repo(str(root)) as repo:
        repo.reproduce()
    assert {each.state for each in states(root).values()} == {"fresh"}


def test_a_stale_stage_names_the_keys_and_files_that_changed_and_the_next_one_follows(trained: Path) -> None:
    (trained / "params.yaml").write_text(PARAMS.replace("0.04", "0.02"))
    (trained / "raw").write_text("other")
    found = states(trained)
    assert found["first"].state == "stale"
    assert sorted(found["first"].why) == ["first.lr 0.04 -> 0.02", "raw changed"]
    assert found["second"] == StageState("second", "stale", ("follows first",))


def test_the_film_strip_is_that_of_the_run_and_before_it_has_one_that_of_the_outputs(trained: Path) -> None:
    output = trained / "reports/first/film.png"
    output.parent.mkdir(parents=True)
    output.touch()
    (trained / "one").unlink()
    run = begin_run(trained)
    assert (states(trained)["first"].state, states(trained)["first"].film) == ("stopped", output)
    (run / "film.png").touch()
    assert states(trained)["first"].film == run / "film.png" and states(trained)["second"].film is None


def test_a_lost_or_edited_output_is_named(trained: Path) -> None:
    (trained / "one").unlink()
    (trained / "two").write_text("edited")
    found = states(trained)
    assert "one is missing" in found["first"].why
    assert "two was changed since" in found["second"].why


def test_a_running_stage_shows_its_progress(root: Path) -> None:
    folder = begin_run(root)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder / LEASE], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    found = states(root)["first"]
    holder.kill()
    holder.communicate()
    assert found.state == "running" and found.progress is not None
    assert (found.progress.nimg, found.progress.total) == (24, 48)
    assert found.progress.rate == pytest.approx(4, rel=0.01)
    assert 0 < (found.progress.left or 0) <= 6
    killed = states(root)["first"]
    assert killed.state == "stopped" and "was killed" in killed.why[0]


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (BadData("E-DAT-001", "x", "is bad", "mend it"), "failed", "E-DAT-001 x: is bad. Fix: mend it"),
        (KeyboardInterrupt(), "stopped", "stopped; run the same command again to continue"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_how_a_stage_ended_is_shown_until_it_succeeds(
    root: Path, error: BaseException, state: str, line: str
) -> None:
    folder = begin_run(root)
    with pytest.raises(type(error)), recorded_ending(folder):
        raise error
    found = states(root)["first"]
    assert (found.state, found.why[0], found.folder) == (state, line, folder)
    with recorded_ending(folder):
        pass
    (folder / "result").mkdir()
    assert states(root)["first"].state == "never run"


def test_a_run_of_other_parameters_says_nothing_of_the_stage(root: Path) -> None:
    begin_run(root, lr=0.5)
    assert states(root)["first"] == StageState("first", "never run")


def test_a_rate_needs_two_records(root: Path) -> None:
    begin_run(root, records=1)
    assert states(root)["first"].progress == Progress(8, 48, None, None)
