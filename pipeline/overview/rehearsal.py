"""A rehearsal: the training stages as they are, but short, in a folder of their own, to see what they will take.

Stages run as `dvc repro` runs them, under the same compute profile, on the project's prepared data, for a few dozen
updates. So a rehearsal measures all that a run does (imports, Ray's start, data, checks, sample grids, export), and
fails where it would. The project's own runs, models and tracking store stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from pipeline.compute import DEFAULT, PROFILE_VARIABLE
from pipeline.config.params import CORE_MODEL, Params, Training
from pipeline.errors import StorageError
from pipeline.evaluation.conditions import SampleCount, plan_samples
from pipeline.evaluation.evidence import Evidence
from pipeline.housekeeping.items import in_words
from pipeline.launch import scratch
from pipeline.models.counting import GPU_MEMORY
from pipeline.overview.counting import flops_of_samples
from pipeline.registry import pins
from pipeline.training.records import Record, read_records

TRAINING = {"pretrain": "models/core", "finetune": "models/finetuned", "refine": "models/refined"}
UPDATES = (16, 64)  # of a rehearsal, at least and at most
SHARE = 0.02  # of the images of a stage, in between
EVALUATIONS = (16, 8)  # a rehearsed evaluation has one part in so many of the calls
POLL_SECONDS = 0.5
LIMIT, PATIENCE = 900.0, 30.0  # seconds that a rehearsal may take, and to end when it is told to


@dataclass(frozen=True)
class Measured:
    """A rehearsed stage. seconds: of the whole run. memory: most bytes that its processes held alone at a time.
    gpu_memory: most bytes that a worker reserved on its GPU; None without one."""

    seconds: float
    memory: int
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Pace:
    """How fast a round of training is. images: that it was rehearsed for. update: seconds for an image. pause: more
    seconds for an update with a sample grid, checks and a checkpoint."""

    images: int
    update: float
    pause: float


class Rehearsal:
    """Rehearses the stages of the project at `root` below `folder`, which is new."""

    def __init__(self, root: Path, folder: Path, params: Params) -> None:
        self.folder, self.params = folder, params
        self.profile = os.environ.get(PROFILE_VARIABLE) or DEFAULT
        scratch.lay_out(folder, root)
        self.link("data/prepared", root)
        pinned = self.folder / "runs/init"  # where stages look first: the rehearsal has a registry of its own
        if params.finetune.init_from != CORE_MODEL:
            pins.fetch(root, params.finetune.init_from, params.finetune.init_sha256, pinned)
        pins.pinned_baseline(root, params.evaluate, pinned)

    def link(self, path: str, root: Path) -> None:
        """Take an output of the project as it is."""
        scratch.link(self.folder / path, (root / path).resolve())

    def train(self, stage: str) -> tuple[Measured, list[Pace]]:
        """Rehearse a training stage; its pace in each round, none where it extracts the core of a pinned model.

        Raises StorageError where it fails."""
        section: Training = getattr(self.params, stage)
        images = rehearsed_images(section)
        measured = self._run(stage, {stage: short(section, images), "evaluate": watched_once(images)})
        return measured, paces(self._records(stage), images, section.batch_size)

    def evaluate(self) -> tuple[Measured, int]:
        """Rehearse the evaluation twice; what the whole one will take, and its float operations."""
        budgets = [max(self.params.evaluate.max_calls // part, 1) for part in EVALUATIONS]
        runs = [self._run("evaluate", {"evaluate": {"max_calls": budget}}) for budget in budgets]
        evidence = Evidence.load(self.folder / "reports/evaluation/evidence.safetensors")
        costs = evidence.description
        calls = sum(costs.nfe.values())
        precision = self.params.promotion.precision

        def count(max_calls: int) -> int:
            samples: SampleCount = plan_samples(precision, max_calls, calls)
            return samples.count

        whole = count(self.params.evaluate.max_calls)
        seconds = extrapolate([count(each) for each in budgets], [each.seconds for each in runs], whole)
        most = max(each.memory for each in runs)
        operations = flops_of_samples(self.params, costs.nfe.values(), costs.multiply_adds.values())
        return Measured(seconds, most, runs[-1].gpu_memory), operations

    def _run(self, stage: str, changes: Mapping[str, Mapping[str, Any]]) -> Measured:
        tree = self.params.model_dump(mode="json")
        for name, values in changes.items():
            tree[name] = {**tree[name], **values}
        scratch.write_params(self.folder, tree)
        env = scratch.environment(self.folder, self.profile) | {"CRESCENDO_GIT_COMMIT": "0" * 40}
        began = time.monotonic()
        with open(self.folder / f"{stage}.log", "w+b") as log:
            command = scratch.command(stage)
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log)
            with PeakMemory(process.pid) as memory:
                try:
                    status = process.wait(timeout=LIMIT)
                except subprocess.TimeoutExpired:
                    end(process)
                    raise self._slow(stage) from None
        if status:
            lines = (self.folder / f"{stage}.log").read_text(errors="replace").splitlines()
            raise _failed(stage, status, lines[-1] if lines else "nothing was said", memory.peak)
        return Measured(time.monotonic() - began, memory.peak, self._gpu_memory(stage))

    def _slow(self, stage: str) -> StorageError:
        """What to say of a rehearsal that took longer than LIMIT."""
        fix = "choose a smaller preset, or a machine that computes faster"
        problem = f"its rehearsal was stopped after {LIMIT / 60:g} minutes"
        seen = max((record["nimg"] for record in self._records(stage)), default=0)
        if seen:
            days = getattr(self.params, stage).num_images / seen * LIMIT / 86400
            problem += f", at {seen:,} images; at this pace a round of training takes {days:.2g} days"
        return StorageError("E-IO-201", stage, problem, fix)

    def _records(self, stage: str) -> list[Record]:
        paths = self.folder.glob(f"runs/{stage}/*/progress.jsonl")
        return [record for path in paths for record in read_records(path)]

    def _gpu_memory(self, stage: str) -> int | None:
        reserved = (json.loads(path.read_text()) for path in self.folder.glob(f"runs/{stage}/*/{GPU_MEMORY}"))
        return max(reserved, default=None)


def _failed(stage: str, status: int, last: str, memory: int) -> StorageError:
    """What to say of a rehearsal that ended with a status, its last line, and the most memory that it held."""
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        problem = (
            f"its rehearsal was killed when it held {in_words(memory)}, as is done where memory runs out"
        )
        fix = (
            "raise its `shards`, or choose a smaller preset or a larger machine: the run itself would end so"
        )
        return StorageError("E-IO-200", stage, problem, fix)
    problem = f"its rehearsal ends with status {status}: {last}"
    return StorageError("E-IO-080", stage, problem, "mend what it names: the run itself would end so")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a stage: a second signal stops it at once, where the first waits for a checkpoint."""
    for stop in (process.terminate, process.terminate, process.kill):
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
            return
    process.wait()


class PeakMemory:
    """While used as a context, watches what a process and those below it hold alone, in bytes."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.peak = max(self.peak, self._held())

    def _held(self) -> int:
        held = 0
        try:
            for process in (self._process, *self._process.children(recursive=True)):
                held += int(process.memory_full_info().uss)
        except psutil.Error:  # one has ended meanwhile
            return 0
        return held


def rehearsed_images(section: Training) -> int:
    """Images for which a stage is rehearsed: an even number of batches, as there is a pause in the middle."""
    batches = section.num_images / section.batch_size
    updates = int(min(max(SHARE * batches, UPDATES[0]), UPDATES[1], batches))
    return max(updates - updates % 2, 2) * section.batch_size


def short(section: Training, images: int) -> dict[str, Any]:
    """Changes of a section of params.yaml for a run of so few images, with one pause in the middle and a record of
    every update."""
    middle = images // 2
    values = {
        "num_images": images,
        "core_images": images,
        "warmup_images": min(section.warmup_images, middle),
        "checkpoint_images": middle,
        "sample_images": middle,
        "log_images": section.batch_size,
        "check_images": middle,
        "early_images": middle,
    }
    own = section.model_dump()
    return {name: value for name, value in values.items() if own.get(name)}


def watched_once(images: int) -> dict[str, Any]:
    """Changes of `evaluate` that have the last snapshot of a rehearsed stage judged, as that of a run is."""
    return {"watch_images": dict.fromkeys(TRAINING, images)}


def paces(records: Sequence[Record], images: int, batch: int) -> list[Pace]:
    """The pace of each round, from a record of every update."""
    times: dict[int, float] = {}
    for record in records:
        times.setdefault(int(record["nimg"]), float(record["time"]))  # the first one: of the update itself
    rounds = -(-max(times, default=0) // images)
    found = []
    for i in range(rounds):
        own = [
            (nimg - i * images, at) for nimg, at in sorted(times.items()) if 0 < nimg - i * images <= images
        ]
        gaps = {nimg: at - before for (_, before), (nimg, at) in pairwise(own)}
        after_pause = images // 2 + batch
        # At the start, imports of the driver and the judge of the round before take their share of the cores.
        late = [gap for nimg, gap in gaps.items() if nimg > after_pause]
        update = statistics.median(late or gaps.values() or [0.0])
        pause = max(gaps.get(after_pause, 0.0) - update, 0.0)
        found.append(Pace(images, update / batch, pause))
    return found


def extrapolate(counts: Sequence[int], seconds: Sequence[float], whole: int) -> float:
    """Seconds for `whole` samples, on the line through two measurements; never less than the last of them."""
    few, more = counts
    slope = max(seconds[1] - seconds[0], 0.0) / (more - few) if more > few else 0.0
    return seconds[1] + slope * max(whole - more, 0)
