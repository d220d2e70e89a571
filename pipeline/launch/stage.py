"""Where a stage runs: in this process, on local Ray, or as a job of a Ray cluster.

A stage is `with open_stage(name, params) as stage:` around its work. It holds the lease of the stage's run
folder, `runs/<stage>/<fingerprint>/`, and its tracking run. `stage.run(worker)` trains there: it continues a
killed run, and does nothing if a finished result verifies. `stage.export` copies the result to the outputs.
The fingerprint is computed from dvc.yaml without DVC or git, which a cluster does not have.

Only this package imports ray, and only when it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import copy_into_place
from pipeline.compute import ComputeProfile, load_profile
from pipeline.config.params import Params
from pipeline.data.folders import push
from pipeline.errors import ConfigError, StorageError
from pipeline.launch import history, machine
from pipeline.launch.backup import Backup
from pipeline.launch.endings import recorded_ending
from pipeline.launch.execution import execute, map_under_ray
from pipeline.launch.fingerprint import (
    code_files,
    dependencies,
    digest_path,
    is_code,
    outputs,
    stage_fingerprint,
    stage_identity,
    stage_params,
)
from pipeline.launch.jobs import log as log_line
from pipeline.launch.jobs import run_as_job
from pipeline.launch.judging import Judge, Judging
from pipeline.launch.session import inside_ray_job, ray_session
from pipeline.launch.stopping import stop_with_checkpoint
from pipeline.launch.watch import ProgressWatch
from pipeline.launch.worker import Worker, WorkerConfig
from pipeline.processes import signal_on_parent_death
from pipeline.project import find_root, home_of
from pipeline.tracking import stage_run
from pipeline.tracking.sync import send_waiting
from pipeline.training.records import STOP, read_records

RUNS_VARIABLE = "CRESCENDO_RUNS"
PREPARED = "data/prepared"


@dataclass
class Stage:
    """One run of one stage, from `open_stage`.

    root: where data, models and reports lie (`data_root`). run_dir: absolute path of its working state. inputs:
    {path: digest} of dependencies other than code. tracker: its MLflow run.
    """

    name: str
    params: Params
    profile: ComputeProfile
    root: Path
    run_dir: Path
    fingerprint: str
    inputs: dict[str, str]
    tracker: stage_run.StageRun

    def worker_config(
        self, init: Path | None = None, watch_images: int = 0, data: str | None = None
    ) -> WorkerConfig:
        """What each worker gets."""
        profile = self.profile
        return WorkerConfig(
            params=self.params,
            root=self.root,
            run_dir=self.run_dir,
            init=init,
            precision=profile.precision,
            recompute=profile.recompute,
            cuda_graphs=profile.cuda_graphs,
            compile=profile.compile,
            shard_state=profile.shard_state,
            watch_images=watch_images,
            prepared=self.inputs.get(PREPARED),
            data=data,
            cache=profile.cache,
            cache_gib=profile.cache_gib,
        )

    def finished(self) -> bool:
        """True if `run_dir/result` exists and verifies; a damaged one is trained again."""
        if not (self.run_dir / "result").exists():
            return False
        try:
            artifacts.verify_directory(self.run_dir / "result")
        except StorageError as exc:
            print(f"warning: {exc}", file=sys.stderr)
            return False
        return True

    def exports_finished(self) -> bool:
        """`finished`, and says that the run is only exported."""
        done = self.finished()
        if done:
            print(f"{self.name}: run {self.run_dir.name} is finished; exporting it", file=sys.stderr)
        return done

    def run(self, worker: Worker, init: Path | None = None, judge: Judge | None = None) -> None:
        """Train: `worker(config)` in one process or many, from the last checkpoint, to `run_dir/result`.

        `init` is a model to start from, below the folder of all runs, which every node of a cluster sees.
        `judge` measures the averaged model meanwhile; the result does not depend on it."""
        judge = judge or Judge(interval=0)
        backup = Backup(self.name, self.run_dir, self.profile.backup) if self.profile.backup else None
        if backup and not history.has_begun(self.run_dir):
            backup.restore()
        if self.exports_finished():
            return
        if section := getattr(self.params, self.name, None):
            require_whole_shards(self.name, section.shards, self.profile)
        data, inputs = self.share_data()
        config = self.worker_config(init, judge.interval, data)
        progress = ProgressWatch(self.name, self.run_dir, self.tracker)
        judging = Judging(self.name, self.root, self.run_dir, judge, self.tracker)
        (self.run_dir / STOP).unlink(missing_ok=True)
        copied = backup or contextlib.nullcontext()
        with copied, judging, progress, stop_with_checkpoint(self.name, self.run_dir):
            if self.profile.address and not inside_ray_job():
                run_as_job(self.name, worker, config, self.profile, inputs)
            else:
                execute(self.name, worker, config, self.profile)
        artifacts.verify_directory(self.run_dir / "result")

    def share_data(self) -> tuple[str | None, list[str]]:
        """Send the prepared data to the profile's store; their URL there, or None without a store, and the other
        inputs."""
        inputs = list(self.inputs)
        if self.profile.data is None or PREPARED not in inputs:
            return None, inputs
        inputs.remove(PREPARED)
        return push(self.root / PREPARED, self.profile.data, partial(log_line, self.name)), inputs

    def map_tasks(
        self, make: Callable[[], AbstractContextManager[Callable[[Any], Any]]], tasks: Sequence[Any]
    ) -> Iterator[Any]:
        """Map `make()`'s function over tasks, in this process or on Ray; yields results as they finish."""
        if self.profile.max_workers == 0:
            with make() as work:
                yield from map(work, tasks)
            return
        with ray_session(self.profile.max_workers, self.run_dir) as session:
            yield from map_under_ray(session, make, tasks)

    def export(self, mapping: Mapping[str, str]) -> None:
        """Copy folders of the run folder to outputs, each atomically: {"result/model": "models/core"}."""
        for source, target in mapping.items():
            copy_into_place(self.run_dir / source, self.root / target, alone=True)
            metrics = self.root / target / "metrics.json"
            if metrics.is_file():
                numbers = _numbers(json.loads(metrics.read_text(encoding="utf-8")))
                self.log_metrics(
                    {f"result/{name}": value for name, value in numbers.items()}, self.last_nimg()
                )
                self.log_artifact(self.root / target)

    def last_nimg(self) -> int:
        """Training images at the newest record of progress; 0 for a stage that trains nothing."""
        records = read_records(self.run_dir / "progress.jsonl")
        return int(records[-1]["nimg"]) if records else 0

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of the stage as a whole to the tracker."""
        self.tracker.log_metrics(metrics, step)

    def log_artifact(self, path: str | Path) -> None:
        """Log a file or folder to the tracker."""
        self.tracker.log_artifact(self.root / path)


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in tree.items() if isinstance(value, int | float)}


def require_whole_shards(stage: str, shards: int, profile: ComputeProfile) -> None:
    """Raise ConfigError where the shards of a batch divide evenly among no number of workers of a profile."""
    few, many = profile.min_workers, profile.max_workers
    if many and not any(shards % workers == 0 for workers in range(few, many + 1)):
        fit = ", ".join(str(each) for each in range(1, shards + 1) if shards % each == 0)
        number = f"{many}" if few == many else f"{few} to {many}"
        problem = f"{shards} shards do not divide evenly among {number} workers"
        fix = f"set `workers` in the compute profile to one of {fit}; or change shards, and with them the last bits"
        raise ConfigError("E-CFG-025", f"params.yaml: {stage}.shards", problem, fix)


def runs_folder(root: Path, profile: ComputeProfile) -> Path:
    """$CRESCENDO_RUNS, or `runs` on the profile's shared storage, or `runs` in the repository.

    An experiment that DVC runs in a folder of its own shares those of the project."""
    folder = os.environ.get(RUNS_VARIABLE)
    if folder:
        return Path(folder).resolve()
    return Path(profile.storage, "runs") if profile.storage else home_of(root) / "runs"


def data_root(code: Path, profile: ComputeProfile) -> Path:
    """What paths of data, models and reports start from: the repository, which is `code`; in a job, whose package
    of code no other node sees, the profile's shared storage."""
    return Path(profile.storage) if profile.storage and inside_ray_job() else code


def stop_with_dvc() -> None:
    """Under `dvc repro`, stop when DVC dies, which would leave us running alongside the next repro."""
    if "DVC_STAGE" not in os.environ or threading.current_thread() is not threading.main_thread():
        return
    signal_on_parent_death(signal.SIGTERM)


@contextlib.contextmanager
def open_stage(name: str, params: Params, root: Path | None = None) -> Iterator[Stage]:
    """Open a stage for the block: hold the lease of its run folder, and its tracking run.

    Raises:
        Busy: another process runs the same stage on the same inputs.
        InputMissing, StorageError: a dependency is missing or does not verify.
    """
    stop_with_dvc()
    code = (root or find_root()).resolve()
    profile = load_profile(code)
    root = data_root(code, profile)
    deps = dependencies(name, code, root)
    fingerprint = stage_fingerprint(name, code, deps)
    inputs = {path: digest for path, digest in deps.items() if not is_code(path)}
    run_dir = runs_folder(root, profile) / name / fingerprint[:16]
    with artifacts.lease(run_dir / stage_run.LEASE), recorded_ending(run_dir):
        artifacts.sweep(run_dir)
        fresh = not history.has_begun(run_dir)
        made_from = {**stage_identity(name, code, deps), "files": code_files(code, deps)}
        if line := history.begin(name, run_dir, made_from):
            print(line, file=sys.stderr)
        if inside_ray_job() or not profile.address:  # else this is not the machine
            machine.begin(run_dir, machine.facts_here(code / machine.LOCK), fresh)
        tracker = stage_run.start_stage_run(
            name,
            root,
            stage_params(name, code),
            inputs,
            code=code,
            folder=run_dir,
            fingerprint=fingerprint,
            fresh=fresh,
        )
        with tracker:
            if tracker.run_id is not None:  # the server answers
                for sync in send_waiting(root, run_dir.parents[1]):
                    print(f"sent to MLflow from {sync.folder}: {sync.waiting}", file=sys.stderr)
            yield Stage(name, params, profile, root, run_dir, fingerprint, inputs, tracker)
            tracker.log_outputs(
                {path: digest_path(root / path) for path in outputs(name, code) if (root / path).exists()}
            )
            tracker.set_tags(
                {f"{machine.TAG}{fact}": text for fact, text in machine.recorded(run_dir).items() if text}
            )
