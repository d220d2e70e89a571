"""Jobs: training of a local stage on a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import copy_into_place
from pipeline.compute import ComputeProfile
from pipeline.config.strict_yaml import parse_section
from pipeline.errors import Busy, PipelineError, StorageError, one_line
from pipeline.launch.execution import execute
from pipeline.launch.failures import FAILURE, failure_record, raise_failure
from pipeline.launch.fingerprint import digest_path
from pipeline.launch.session import RAY_ENV
from pipeline.launch.stopping import stop_with_checkpoint
from pipeline.launch.watch import POLL_SECONDS
from pipeline.launch.worker import Worker, WorkerConfig

JOB = "job.json"
CODE = ("pipeline", "stages")  # all that a job is given of the checkout
UNREACHABLE_SECONDS = 600.0  # for which a cluster may not answer while a job trains
READY_SECONDS = 120.0  # for which a cluster that has just started may not take jobs
# Of requests: no connection, a timeout, an answer of the server that it cannot serve just now.
UNREACHABLE = (OSError, RuntimeError)
FAILPOINTS = ("CRESCENDO_FAILPOINT", "CRESCENDO_FAILPOINT_FILE")


def name_of(worker: Worker) -> str:
    """`module:function`, by which another machine finds the worker; also one of the module that is the program."""
    module = sys.modules[worker.__module__]
    return f"{module.__spec__.name if module.__spec__ else module.__name__}:{worker.__qualname__}"


def run_as_job(
    stage: str, worker: Worker, config: WorkerConfig, profile: ComputeProfile, inputs: Sequence[str]
) -> None:
    """Submit `worker` to the cluster at `profile.address`, and wait for it.

    The code is uploaded as the job's package. Inputs are copied, by digest, to the shared storage, which holds
    the run folder, too. If a job of this run is still alive, this waits for it instead: a killed client may return.

    Raises:
        StorageError: the cluster does not accept the job. Busy: the job was stopped or died.
    """
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
    with _failing(profile.address):
        client = _client(profile.address)
        job = _start(client, stage, root, run_dir)
    _wait_for(client, job, stage, run_dir)


def cluster_version(address: str) -> str:
    """The version of Ray that the cluster at a dashboard's URL runs. Raises StorageError where none answers."""
    with _failing(address):
        return str(_client(address).get_version())


def _client(address: str) -> Any:
    """A JobSubmissionClient."""
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    from ray.job_submission import JobSubmissionClient

    os.environ.pop("RAY_ADDRESS", None)  # It would take precedence over the address.
    return JobSubmissionClient(address)


@contextlib.contextmanager
def _failing(address: str) -> Iterator[None]:
    try:
        yield
    except UNREACHABLE as error:
        if getattr(error, "filename", None):  # of this machine
            raise
        problem = f"no Ray cluster accepts jobs ({error})"
        raise StorageError("E-IO-030", address, problem, "check `address` and the cluster") from None


def _start(client: Any, stage: str, root: Path, run_dir: Path) -> str:
    """The id of the job of `run_dir`, which is submitted unless one is alive. Servers of a cluster start one after
    the other, so a server's error is no refusal before READY_SECONDS."""
    deadline = time.monotonic() + READY_SECONDS
    waiting = False
    while True:
        try:
            return _running_job(client, str(run_dir)) or _submit(client, root, run_dir)
        except RuntimeError as error:
            if "status code 5" not in str(error) or time.monotonic() > deadline:
                raise
            if not waiting:
                log(stage, f"the cluster takes no jobs yet, waiting for it ({one_line(str(error))})")
            waiting = True
        time.sleep(POLL_SECONDS)


def _submit(client: Any, root: Path, run_dir: Path) -> str:
    """Upload the code, and start the job; its id. A copy is uploaded, since Ray digests the folder twice, and
    nothing but CODE, so that neither data nor secrets leave the checkout."""
    with tempfile.TemporaryDirectory(prefix="crescendo-job-") as package:
        for name in CODE:
            shutil.copytree(root / name, Path(package, name), ignore=shutil.ignore_patterns("__pycache__"))
        job = client.submit_job(
            entrypoint=f"python -m stages.job {shlex.quote(str(run_dir))}",
            runtime_env={"working_dir": package, "env_vars": _job_environment()},
            metadata={"crescendo_run": str(run_dir)},
        )
    return str(job)


def _job_environment() -> dict[str, str]:
    return {**RAY_ENV, **{name: os.environ[name] for name in FAILPOINTS if name in os.environ}}


def _running_job(client: Any, run_dir: str) -> str | None:
    for job in client.list_jobs():
        if (job.metadata or {}).get("crescendo_run") == run_dir and not job.status.is_terminal():
            return str(job.submission_id)
    return None


def _wait_for(client: Any, job: str, stage: str, run_dir: Path) -> None:
    """Return once `job` has succeeded. The first Ctrl-C or SIGTERM asks it to stop, through the run folder
    (stopping.py); the second one stops it at once."""
    from ray.job_submission import JobStatus

    try:
        info = _final_info(client, job, stage)
    except KeyboardInterrupt:
        try:
            client.stop_job(job)
        except UNREACHABLE as error:
            log(stage, f"the job {job} could not be stopped and may train on ({one_line(str(error))})")
        raise
    raise_failure(run_dir)
    if info.status != JobStatus.SUCCEEDED:
        problem = f"the job {job} ended as {info.status.value}: {_reason(client, job, info, run_dir)}"
        raise Busy(
            "E-BUSY-031", stage, problem, "run the same command again to continue from the last checkpoint"
        )


def _final_info(client: Any, job: str, stage: str) -> Any:
    """What Ray knows of a job that has ended. The cluster may be out of reach meanwhile, as the job trains on.

    Raises Busy where it is for UNREACHABLE_SECONDS."""
    silent_since: float | None = None
    while True:
        try:
            info = client.get_job_info(job)
        except UNREACHABLE as error:
            if silent_since is None:
                silent_since = time.monotonic()
                log(stage, f"the cluster does not answer, the job trains on ({one_line(str(error))})")
            if time.monotonic() - silent_since > UNREACHABLE_SECONDS:
                problem = f"the cluster has not answered for {UNREACHABLE_SECONDS:.0f} s"
                fix = f"the job {job} may train on: run the same command again to join it"
                raise Busy("E-BUSY-032", stage, problem, fix) from None
        else:
            if silent_since is not None:
                log(stage, "the cluster answers again")
            silent_since = None
            if info.status.is_terminal():
                return info
        time.sleep(POLL_SECONDS)


def _reason(client: Any, job: str, info: Any, run_dir: Path) -> str:
    """Why a job ended: what Ray says, and where its log is if there is one."""
    reason = one_line(info.message or "no reason given")
    try:
        logged = client.get_job_logs(job)
    except UNREACHABLE:
        return f"{reason} (its log could not be fetched)"
    if not logged.strip():
        return f"{reason} (it logged nothing)"
    (run_dir / "job.log").write_text(logged, encoding="utf-8")
    return f"{reason} (its log is {run_dir / 'job.log'})"


def log(stage: str, line: str) -> None:
    """To stderr."""
    print(f"{stage}: {line}", file=sys.stderr, flush=True)


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


def run_job(run_dir: Path) -> None:
    """Train, on the cluster, what `run_as_job` wrote to `run_dir`."""
    body = json.loads((run_dir / JOB).read_text(encoding="utf-8"))
    module, _, function = body["worker"].partition(":")
    worker: Worker = getattr(importlib.import_module(module), function)
    profile = parse_section(ComputeProfile, body["profile"], JOB)
    try:
        with stop_with_checkpoint(body["stage"], run_dir):
            execute(body["stage"], worker, WorkerConfig.from_dict(body["config"]), profile)
    except (PipelineError, OSError) as exc:
        artifacts.write_atomic(run_dir / FAILURE, json.dumps(failure_record(exc)))
        raise
