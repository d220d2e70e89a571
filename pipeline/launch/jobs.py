"""Jobs: training of a local stage on a Ray cluster."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import copy_into_place
from pipeline.compute import ComputeProfile
from pipeline.errors import Busy, PipelineError, StorageError
from pipeline.launch.execution import RAY_ENV, execute
from pipeline.launch.failures import FAILURE, failure_record, raise_failure
from pipeline.launch.fingerprint import digest_path
from pipeline.launch.watch import POLL_SECONDS
from pipeline.launch.worker import Worker, WorkerConfig
from pipeline.tracking import store

JOB = "job.json"
EXCLUDES = [
    f"/{name}" for name in (".git", ".venv*", ".dvc", "data", "models", "reports", "runs", "mlartifacts")
]
FAILPOINTS = ("CRESCENDO_FAILPOINT", "CRESCENDO_FAILPOINT_FILE")


def name_of(worker: Worker) -> str:
    """`module:function`, by which another machine finds the worker."""
    return f"{worker.__module__}:{worker.__qualname__}"


def run_as_job(
    stage: str, worker: Worker, config: WorkerConfig, profile: ComputeProfile, inputs: Sequence[str]
) -> None:
    """Submit `worker` to the cluster at `profile.address`, and wait for it.

    The code is uploaded as the job's package. Inputs are copied, by digest, to the shared storage, which holds
    the run folder, too. If a job of this run is still alive, this waits for it instead: a killed client may return.

    Raises:
        StorageError: the cluster does not accept the job. Busy: the job was stopped or died.
    """
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    from ray.job_submission import JobSubmissionClient

    assert profile.address is not None
    assert profile.storage is not None
    root, run_dir = config.root, config.run_dir
    shared = share_inputs(root, Path(profile.storage), run_dir, inputs)
    body = {
        "stage": stage,
        "worker": name_of(worker),
        "config": replace(config, root=shared).to_dict(),
        "profile": profile.model_dump(mode="json"),
    }
    artifacts.write_atomic(run_dir / JOB, json.dumps(body, indent=1))
    (run_dir / FAILURE).unlink(missing_ok=True)
    os.environ.pop("RAY_ADDRESS", None)  # It would take precedence over the profile's address.
    try:
        client = JobSubmissionClient(profile.address)
        job = _running_job(client, str(run_dir)) or client.submit_job(
            entrypoint=f"python -m stages.job {shlex.quote(str(run_dir))}",
            runtime_env={"working_dir": str(root), "excludes": EXCLUDES, "env_vars": _job_environment()},
            metadata={"crescendo_run": str(run_dir)},
        )
    except (ConnectionError, RuntimeError) as error:
        problem = f"no Ray cluster accepts the job ({error})"
        raise StorageError("E-IO-030", profile.address, problem, "check `address` and the cluster") from None
    _wait_for(client, job, stage, run_dir)


def _job_environment() -> dict[str, str]:
    return {**RAY_ENV, **{name: os.environ[name] for name in FAILPOINTS if name in os.environ}}


def _running_job(client: Any, run_dir: str) -> str | None:
    for job in client.list_jobs():
        if (job.metadata or {}).get("crescendo_run") == run_dir and not job.status.is_terminal():
            return str(job.submission_id)
    return None


def _wait_for(client: Any, job: str, stage: str, run_dir: Path) -> None:
    """Return once `job` has succeeded; Ctrl-C or SIGTERM stops the job, too."""
    from ray.job_submission import JobStatus

    try:
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    raise_failure(run_dir)
    if status != JobStatus.SUCCEEDED:
        (run_dir / "job.log").write_text(client.get_job_logs(job), encoding="utf-8")
        problem = f"the job {job} ended as {status.value}; its log is {run_dir / 'job.log'}"
        raise Busy(
            "E-BUSY-031", stage, problem, "run the same command again to continue from the last checkpoint"
        )


def share_inputs(root: Path, storage: Path, run_dir: Path, inputs: Sequence[str]) -> Path:
    """A folder on the shared storage with `inputs` at their paths; each digest is copied once."""
    view = run_dir / "inputs"
    for name in inputs:
        source = root / name
        target = storage / "inputs" / digest_path(source)
        if not target.exists():
            copy_into_place(source, target)
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))
    view.mkdir(parents=True, exist_ok=True)
    return view


def link_storage(root: Path, storage: Path, paths: Sequence[str]) -> None:
    """Link what a job's package leaves out to the shared storage: the top folders of `paths` (data, models,
    reports) and the tracking store. Existing ones stay.
    """
    folders = {Path(path).parts[0] for path in paths if not Path(path).is_absolute()}
    for name in folders:
        (storage / name).mkdir(parents=True, exist_ok=True)
    for name in {*folders, store.STORE}:
        if not os.path.lexists(root / name):
            (root / name).symlink_to(storage / name)


def run_job(run_dir: Path) -> None:
    """Train, on the cluster, what `run_as_job` wrote to `run_dir`."""
    body = json.loads((run_dir / JOB).read_text(encoding="utf-8"))
    module, _, function = body["worker"].partition(":")
    worker: Worker = getattr(importlib.import_module(module), function)
    profile = ComputeProfile.model_validate(body["profile"])
    try:
        execute(body["stage"], worker, WorkerConfig.from_dict(body["config"]), profile)
    except (PipelineError, OSError) as exc:
        artifacts.write_atomic(run_dir / FAILURE, json.dumps(failure_record(exc)))
        raise
