"""Training stages are killed at random moments and end with the bits and points of a run that was left alone.

This is `crescendo drill` in batches, on a tiny project of its own (tests/tiny.yaml on two dozen drawn pictures), in
the stage's own process. Each start is a fork of this process, which has imported what a stage imports, so that a
kill costs a second and not the half minute of a fresh start. Under Ray each start is a fresh one.
"""

from __future__ import annotations

import math
import os
import runpy
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.chaos import forks
from benchmarks.chaos.project import ROOT
from benchmarks.chaos.results import Findings
from benchmarks.chaos.stores import Store
from pipeline import artifacts
from pipeline.config.params import parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.drill.drill import compare
from pipeline.drill.killing import Attempt
from pipeline.drill.plan import scaled
from pipeline.drill.receipt import Receipt
from pipeline.drill.scratch import Scratch, make_scratch
from pipeline.launch import scratch as layout
from pipeline.launch.worker import WorkerConfig
from pipeline.prepare.prepare import prepare
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain

KILLS, PICTURES = 20, 24
LENGTH = 240  # batches of a run; of a few dozen, tiny as they are, most kills would come too late
SOON = 15  # s, in which a stage shall be back after a kill
MODELS = {"core": pretrain, "finetuned": finetune}
PROFILE = "process"


@dataclass
class ForkedStage:
    """A stage in a fork, with the part of `subprocess.Popen` that a drill uses."""

    process: Any

    @property
    def pid(self) -> int:
        """Of the process, and of its session."""
        return int(self.process.pid)

    def poll(self) -> int | None:
        """The status; None while it runs."""
        return self.process.exitcode

    def wait(self) -> int:
        """Wait for the status."""
        self.process.join()
        return int(self.process.exitcode)

    def kill(self) -> None:
        """Kill it."""
        self.process.kill()


@dataclass
class ForkedAttempt(Attempt):
    """An attempt whose starts are forks. sessions: of all of them."""

    sessions: list[int] = field(default_factory=list)

    def start(self) -> None:
        """As `Attempt.start`."""
        if self.alive():
            return
        self.require_a_known_ending()
        self.finished |= self.process is not None and self.process.poll() == 0
        process = forks.CONTEXT.Process(target=run_stage, args=(self.scratch,))
        process.start()
        stage: Any = ForkedStage(process)
        self.process = stage
        self.sessions.append(stage.pid)
        self.begun = time.time()

    def remaining(self) -> list[str]:
        """Processes that outlive the stage; they are killed."""
        left = [
            pid
            for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
            if session_of(pid) in self.sessions
        ]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return [str(pid) for pid in left]


def session_of(pid: int) -> int | None:
    """The session of a process; None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def run_stage(scratch: Scratch) -> None:
    """Run the stage of a scratch project in this process."""
    os.setsid()
    os.chdir(scratch.folder)
    os.environ.clear()
    os.environ.update(scratch.environment)
    log = os.open(scratch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    runpy.run_module(f"stages.{scratch.stage}", run_name="__main__")


def kill(stage: str, seed: int, folder: Path, _: Store) -> Findings:
    """One batch of kills of a stage, in `folder`."""
    project = tiny_project(folder.parent)
    params = scaled(read_yaml(project / "params.yaml"), stage, LENGTH)
    attempts = [
        ForkedAttempt(Scratch(folder / name, stage, PROFILE), False)
        for name in ("rehearsal", "quiet", "killed")
    ]
    for attempt in attempts:
        make_scratch(attempt.scratch, project, params)
    rehearsal, quiet, noisy = attempts

    def rehearse() -> None:
        try:
            run_stage(rehearsal.scratch)
        except SystemExit as end:
            assert not end.code, f"{rehearsal.scratch.log}: status {end.code}"

    forks.warm_up(rehearse, folder / "log", {})
    receipt = compare(quiet, noisy, KILLS, seed, math.inf, lambda line: None)
    return findings(receipt)


def kill_under_ray(stage: str, seed: int, folder: Path, _: Store) -> Findings:
    """One batch of kills of a stage on two workers under Ray, in `folder`."""
    project = tiny_project(folder.parent)
    params = scaled(read_yaml(project / "params.yaml"), stage, LENGTH)
    quiet, noisy = (Attempt(Scratch(folder / name, stage, "local"), True) for name in ("quiet", "killed"))
    for attempt in (quiet, noisy):
        make_scratch(attempt.scratch, project, params)
    return findings(compare(quiet, noisy, KILLS, seed, math.inf, lambda line: None))


def findings(receipt: Receipt) -> Findings:
    """What a receipt says, as findings."""
    kills = len(receipt.kills)
    early = sum(each["image"] == 0 for each in receipt.kills)
    counts = {
        "kills": kills,
        "before the first batch": early,
        "points": receipt.points,
        "files": receipt.files,
        f"next batch within {SOON} s": sum(seconds <= SOON for seconds in receipt.recoveries),
        "later": sum(seconds > SOON for seconds in receipt.recoveries),
    }
    failures = [] if receipt.passed else [f"seed {receipt.seed}: {line}" for line in receipt.lines()]
    return Findings(Counter(counts), failures)


def tiny_project(folder: Path) -> Path:
    """A project below `folder` with prepared data and models to train on from, made at the first call."""
    tree = tiny_tree()
    project = folder / f"tiny-{artifacts.digest(tree)[:8]}"
    if project.exists():
        return project
    making = project.with_name(f"{project.name}.tmp-{os.getpid()}")
    layout.lay_out(making, ROOT)
    layout.write_params(making, tree)
    (making / "data/raw").mkdir(parents=True)
    forks.call(fill, making, log=making / "log")
    making.rename(project)
    return project


def tiny_tree() -> dict[str, Any]:
    """params.yaml with the changes of tests/tiny.yaml, on pictures of a folder, without judges."""
    tree = read_yaml(ROOT / "params.yaml")
    for key, changes in read_yaml(ROOT / "tests/tiny.yaml").items():
        tree[key] = {**tree[key], **changes} if isinstance(changes, dict) else changes
    data = {"source": "folder", "path": "data/raw", "subset": [], "text_encoder": "label"}
    return {**tree, "data": {**tree["data"], **data}}


def fill(project: Path) -> None:
    """Draw pictures, prepare them, and train a core and a fine-tuned model on them."""
    for number in range(PICTURES):
        squares = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(squares.repeat(6, 0).repeat(6, 1)).save(project / f"data/raw/{number:03d}.png")
    params = parse_params(read_yaml(project / "params.yaml"))
    prepare(params, project, project / "work")
    for name, train in MODELS.items():
        run_dir = project / "runs" / name
        run_dir.mkdir(parents=True)
        train(WorkerConfig(params, project, run_dir, precision="float32"))
        shutil.copytree(run_dir / "result/model", project / "models" / name)
