"""Where a stage runs: in this process, on local Ray, or as a job of a Ray cluster.

A stage is `with open_stage(name, params) as stage:` around its work. That holds the lease of the stage's
run folder, `runs/<stage>/<fingerprint>/`, and its tracking run. `stage.run(worker)` trains there, continuing
where a killed run left off, or doing nothing where a finished result verifies; `stage.export` copies the
result to the outputs. The fingerprint is taken from dvc.yaml without DVC or git: a cluster has neither.

This is the one module of the pipeline that imports ray, and it does so when it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pipeline import artifacts, tracking
from pipeline.config import ComputeProfile, Params, load_profile
from pipeline.errors import (
    AccessError,
    BadData,
    Busy,
    ConfigError,
    GateFailed,
    InputMissing,
    PipelineError,
    StorageError,
    describe,
)

Worker = Callable[[dict[str, Any]], None]

CHECKPOINT_FORMAT = 2  # Another one starts other runs instead of failing to load.
RUNS_VARIABLE = "CRESCENDO_RUNS"
STATES = ("result", "checkpoints", "*/checkpoints")  # what a run that began has left in its folder
POLL_SECONDS = 1.0
LINE_SECONDS = 15.0  # between progress lines where there is no terminal
FAILURE = "failure.json"
JOB = "job.json"
PR_SET_PDEATHSIG = 1


# --- What DVC compares for a stage.


def read_stages(root: Path) -> dict[str, Any]:
    """The stages of dvc.yaml, with `${section.key}` replaced by the values of params.yaml."""
    tree, params = _yaml(root / "dvc.yaml"), _yaml(root / "params.yaml")

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\$\{([^}]+)\}", lambda found: str(_lookup(params, found[1])), value)
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            return {fill(key): fill(item) for key, item in value.items()}
        return value

    stages: dict[str, Any] = fill(tree["stages"])
    return stages


def _yaml(path: Path) -> Any:
    from ruamel.yaml import YAML

    if not path.is_file():
        raise InputMissing("E-INP-030", str(path), "is missing", "run from the root of a checkout")
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def _lookup(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            raise ConfigError("E-CFG-030", "dvc.yaml", f"params.yaml has no {dotted}", "correct the key")
        tree = tree[key]
    return tree


def digest_path(path: Path) -> str:
    """Digest of a file's bytes, of an artifact directory's verified manifest, or of any folder's files.

    Raises InputMissing where there is nothing, StorageError where an artifact does not verify.
    """
    if path.is_file():
        return artifacts.sha256_file(path)
    if (path / artifacts.MANIFEST).is_file():
        artifacts.verify_directory(path)
        return artifacts.directory_digest(path)
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return artifacts.digest({str(file.relative_to(path)): artifacts.sha256_file(file) for file in files})
    raise InputMissing("E-INP-031", str(path), "is missing", "run `dvc repro`, which makes or fetches it")


def digest_url(url: str) -> str:
    """Digest of names, sizes and versions of what lies below a URL. Raises InputMissing if it does not answer."""
    from pipeline.data.sources.trees import RemoteTree

    return artifacts.digest([[file.name, file.size, file.version] for file in RemoteTree(url).files()])


def _names(entries: Sequence[Any]) -> list[str]:
    """Paths of `deps` or `outs`, each a path or {path: flags}."""
    return [next(iter(entry)) if isinstance(entry, Mapping) else str(entry) for entry in entries]


def dependencies(stage: str, root: Path) -> dict[str, str]:
    """{path: digest} of all that `stage` depends on, code included."""
    names = _names(_section(stage, root).get("deps", []))
    return {path: digest_url(path) if "://" in path else digest_path(root / path) for path in names}


def outputs(stage: str, root: Path) -> list[str]:
    """Paths that `stage` writes."""
    return _names(_section(stage, root).get("outs", []))


def _section(stage: str, root: Path) -> dict[str, Any]:
    section: dict[str, Any] = read_stages(root)[stage]
    return section


def _params_of(stage: str, root: Path) -> dict[str, Any]:
    tree = _yaml(root / "params.yaml")
    return {name: _lookup(tree, name) for name in _section(stage, root).get("params", [])}


def stage_fingerprint(stage: str, root: Path, deps: Mapping[str, str] | None = None) -> str:
    """Digest of what DVC compares for `stage` (its dependencies and parameters) and the checkpoint format."""
    compared = dict(deps if deps is not None else dependencies(stage, root))
    return artifacts.digest(
        {"stage": stage, "deps": compared, "params": _params_of(stage, root), "format": CHECKPOINT_FORMAT}
    )


# --- Progress: what a worker appends to progress.jsonl, on the terminal and in the tracker.


class Tail:
    """Whole new records of a growing JSON-lines file, which may also be cut and replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = -1, 0
        self._seen: set[tuple[int, float]] = set()

    def read(self) -> list[dict[str, Any]]:
        """Records that were not returned before; none where there is no file yet."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._offset += len(whole) + 1
        records = [json.loads(line) for line in whole.split(b"\n")]
        fresh = [record for record in records if (record["nimg"], record["time"]) not in self._seen]
        self._seen.update((record["nimg"], record["time"]) for record in fresh)
        return fresh


def progress_line(stage: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """`pretrain 3,200/64,000 images, 85.3/s, loss 0.1234, 11:52 left`, from two records of one session."""
    parts = [f"{stage} {last['nimg']:,}/{last['total']:,} images"]
    elapsed, seen = last["time"] - first["time"], last["nimg"] - first["nimg"]
    speed = seen / elapsed if elapsed > 0 else 0.0
    if speed > 0:
        parts.append(f"{speed:.3g}/s")
    loss = next((name for name in last["metrics"] if "loss" in name), None)
    if loss:
        parts.append(f"{loss.replace('_loss', ' loss')} {last['metrics'][loss]:.4g}")
    if speed > 0:
        parts.append(f"{_clock((last['total'] - last['nimg']) / speed)} left")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressWatch:
    """A thread that follows a run folder while a worker trains: prints progress, feeds the tracker."""

    def __init__(self, stage: str, run_dir: Path, run: tracking.StageRun, out: TextIO | None = None) -> None:
        self.stage, self.run_dir, self.run = stage, run_dir, run
        self.out = out or sys.stderr
        self._tail = Tail(run_dir / "progress.jsonl")
        self._pictures: set[Path] = set()
        self._first: dict[str, Any] | None = None
        self._line = self._shown = ""
        self._last_line = time.monotonic() - LINE_SECONDS
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> ProgressWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look(final=True)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._look()

    def _look(self, final: bool = False) -> None:
        records = self._tail.read()
        if records:
            self.run.log_batch(records)
        for picture in sorted(set((self.run_dir / "samples").glob("nimg-*.png")) - self._pictures):
            if not final and time.time() - picture.stat().st_mtime < POLL_SECONDS:
                continue  # It may still be being written.
            self._pictures.add(picture)
            self.run.log_image(picture, "samples", int(picture.stem.removeprefix("nimg-")))
        live = [r for r in records if "total" in r and r["metrics"] and r["time"] >= self._started]
        if live:
            self._first = self._first or live[0]
            self._line = progress_line(self.stage, self._first, live[-1])
        if self._line and (live or final):
            self._print(self._line, final)
        if final and self._first and self.out.isatty():
            print(file=self.out, flush=True)

    def _print(self, line: str, final: bool) -> None:
        if self.out.isatty():
            print(f"\r\x1b[2K{line}", end="", file=self.out, flush=True)
        elif final or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            if line != self._shown:
                print(line, file=self.out, flush=True)
            self._shown = line


# --- Failures that are no use repeating: carried from a worker to the driver as JSON.


def guarded(worker: Worker, config: dict[str, Any]) -> None:
    """Run `worker`; a failure that a restart would only repeat is written to `run_dir/failure.json`.

    It is raised as well, since only Ray can stop the peers, which wait in a collective. The restart that
    follows finds the record and ends at once; `raise_failure` then tells the driver. What a restart may cure
    leaves no record: RuntimeError (collectives whose peer died, devices) and lost connections.
    """
    record = Path(config["run_dir"]) / FAILURE
    if record.exists():
        return
    try:
        worker(config)
    except (RuntimeError, ConnectionError, TimeoutError):
        raise
    except Exception as exc:
        artifacts.write_atomic(record, json.dumps(_portable(exc)))
        raise


def _portable(exc: Exception) -> dict[str, Any]:
    if isinstance(exc, PipelineError):
        return {"kind": type(exc).__name__, "args": list(exc.args)}
    if describe(exc) is not None and isinstance(exc, OSError):
        return {"kind": "OSError", "args": [exc.errno, exc.strerror or str(exc), str(exc.filename or "")]}
    return {"kind": "bug", "args": ["".join(traceback.format_exception(exc))]}


def raise_failure(run_dir: Path) -> None:
    """Raise the failure that a worker recorded, if any, and clear the record."""
    record = run_dir / FAILURE
    if not record.is_file():
        return
    failure = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    kinds: tuple[type[PipelineError], ...] = (
        ConfigError, InputMissing, BadData, StorageError, Busy, AccessError, GateFailed,
    )  # fmt: skip
    by_name = {kind.__name__: kind for kind in kinds}
    if failure["kind"] in by_name:
        raise by_name[failure["kind"]](*failure["args"])
    if failure["kind"] == "OSError":
        number, reason, filename = failure["args"]
        raise OSError(number, reason, filename) if filename else OSError(number, reason)
    raise RuntimeError(f"a training worker failed:\n{failure['args'][0]}")


# --- Ray Train.

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_enable_metrics_collection": "0",
}


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def require_token() -> None:
    """Make Ray processes of this environment ask each other for a token, unless it says otherwise.

    Must come before ray is imported, which reads the mode once. Without a token in the environment Ray makes
    one itself, and leaves it in ~/.ray/auth_token.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def ray_session(workers: int, inside_job: bool) -> Iterator[None]:
    """A private, quiet Ray on this machine; or, where this process is a job's, the cluster's."""
    import logging

    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if not inside_job:
        require_token()
    import ray

    main = threading.current_thread() is threading.main_thread()
    kept = signal.getsignal(signal.SIGTERM) if main else None
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if inside_job:
        ray.init(address="auto", **common)
    else:
        os.environ.pop("RAY_ADDRESS", None)
        ray.init(
            address="local",
            num_cpus=max(workers, cpu_count()),
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            **common,
        )
    if main and kept is not None:
        signal.signal(signal.SIGTERM, kept)  # ray.init replaces it by one that ends without unwinding.
    try:
        logging.getLogger("ray").setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()


def inside_ray_job() -> bool:
    """True in the driver of a Ray job, where a cluster is at hand."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def train_under_ray(stage: str, worker: Worker, config: dict[str, Any], profile: ComputeProfile) -> None:
    """Run `worker` in `profile.workers` processes with a process group; killed ones restart together.

    Raises:
        Busy: workers died more often than the profile allows.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchTrainer

    scratch = Path(config["run_dir"]) / "ray"
    trainer = TorchTrainer(
        _RemoteWorker(worker),
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=profile.workers, use_gpu=profile.use_gpu),
        run_config=RunConfig(
            name=f"{stage}-{secrets.token_hex(8)}",  # Ray "resumes" a name it knows, finished or not.
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=profile.max_failures),
        ),
    )
    try:
        _aside(trainer.fit)
    except TrainingFailedError as error:
        raise_failure(Path(config["run_dir"]))
        if not isinstance(error, WorkerGroupError):
            raise
        raise _explain(stage, error.worker_failures, profile.max_failures) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _aside(work: Callable[[], object]) -> None:
    """`work()` in a thread of its own: in the main one Ray's `fit` takes Ctrl-C over, and it ends with status 1."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            outcome.set_exception(exc)
        else:
            outcome.set_result(None)

    threading.Thread(target=run, name="fit", daemon=True).start()
    outcome.result()


@dataclass(frozen=True)
class _RemoteWorker:
    """`guarded(worker, config)` as an object that Ray can send.

    It is killed with its raylet: without its driver it would train on for seconds, beside the next attempt.
    """

    worker: Worker

    def __call__(self, config: dict[str, Any]) -> None:
        signal_on_parent_death(signal.SIGKILL)
        guarded(self.worker, config)


def _explain(stage: str, failures: Mapping[int, Exception], max_failures: int) -> Exception:
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    # A worker that died takes its peers' collectives with it; their errors only follow from it.
    death = (RayActorError, WorkerHealthCheckFailedError)
    dead = sorted(rank for rank, error in failures.items() if isinstance(error, death))
    if dead or not failures:
        problem = f"worker {', '.join(map(str, dead)) or '?'} died, after {max_failures} restarts"
        fix = "free memory if it was short, and run it again: it continues from the last checkpoint"
        return Busy("E-BUSY-030", stage, problem, fix)
    rank, error = min(failures.items())
    return RuntimeError(f"training worker {rank} failed:\n{error}")


def execute(stage: str, worker: Worker, config: dict[str, Any], profile: ComputeProfile) -> None:
    """Run `worker` here: in this process, or on Ray (the cluster's inside a job, else one of our own)."""
    (Path(config["run_dir"]) / FAILURE).unlink(missing_ok=True)
    if profile.workers == 0:
        worker(config)
        return
    with ray_session(profile.workers, inside_ray_job()):
        train_under_ray(stage, worker, config, profile)
    raise_failure(Path(config["run_dir"]))


# --- Ray Data.


def _answer(
    batch: dict[str, Any], make: Callable[[], AbstractContextManager[Callable[[Any], Any]]]
) -> dict[str, Any]:
    """One task of `map_under_ray`."""
    signal_on_parent_death(signal.SIGKILL)
    with make() as work:
        return {"answer": [work(task) for task in batch["task"]]}


def map_under_ray(
    make: Callable[[], AbstractContextManager[Callable[[Any], Any]]], tasks: Sequence[Any]
) -> Iterator[Any]:
    """`make()`'s function on every task, one at a time on each core of the cluster; answers as they come.

    A task whose worker dies is done again. Errors of ours come through as they are."""
    import logging

    import ray
    from ray.data import DataContext, TaskPoolStrategy, from_items

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    at_once = min(cores, len(tasks))  # Ray warns of a limit above the number of tasks.
    rows = from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    mapped = rows.map_batches(
        _answer, fn_kwargs={"make": make}, batch_size=1, compute=TaskPoolStrategy(size=at_once), num_cpus=1
    )
    try:
        for row in mapped.iter_rows():
            yield row["answer"]
    except ray.exceptions.RayError as error:
        raise _ours(error) or error from None


def _ours(error: BaseException) -> Exception | None:
    """The error for users, or of the operating system, that a remote worker raised."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PipelineError | OSError) and describe(seen):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


# --- Jobs: a stage of this machine whose training runs on a cluster.


def name_of(worker: Worker) -> str:
    """`module:function`, by which another machine finds the worker."""
    return f"{worker.__module__}:{worker.__qualname__}"


def run_as_job(
    stage: str, worker: Worker, config: dict[str, Any], profile: ComputeProfile, inputs: Sequence[str]
) -> None:
    """Submit `worker` to the cluster at `profile.address`, and wait for it.

    The code travels as the job's package; inputs travel, by digest, through the shared storage, in which the
    run folder lies too. A job of this run that is alive already is joined, so a killed client may come back.

    Raises:
        StorageError: no answer from the cluster. Busy: the job was stopped or died.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    from ray.job_submission import JobSubmissionClient

    assert profile.address is not None
    assert profile.storage is not None
    root, run_dir = Path(config["root"]), Path(config["run_dir"])
    shared = share_inputs(root, Path(profile.storage), run_dir, inputs)
    body = {
        "stage": stage,
        "worker": name_of(worker),
        "config": {**config, "root": str(shared)},
        "profile": profile.model_dump(mode="json"),
    }
    artifacts.write_atomic(run_dir / JOB, json.dumps(body, indent=1))
    (run_dir / FAILURE).unlink(missing_ok=True)
    os.environ.pop("RAY_ADDRESS", None)  # It would win over the profile's address.
    try:
        client = JobSubmissionClient(profile.address)
        job = _living_job(client, str(run_dir)) or client.submit_job(
            entrypoint=f"python -m stages.job {_quote(str(run_dir))}",
            runtime_env={
                "working_dir": str(root),
                "excludes": [
                    "/.git",
                    "/.venv",
                    "/.dvc",
                    "/data",
                    "/models",
                    "/reports",
                    "/runs",
                    "/mlartifacts",
                ],
                "env_vars": _forwarded(),
            },
            metadata={"crescendo_run": str(run_dir)},
        )
    except (ConnectionError, RuntimeError) as error:
        problem = f"no Ray cluster takes the job ({error})"
        raise StorageError("E-IO-030", profile.address, problem, "check `address` and the cluster") from None
    _wait_for(client, job, stage, run_dir)


def _quote(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _forwarded() -> dict[str, str]:
    names = ("CRESCENDO_FAILPOINT", "CRESCENDO_FAILPOINT_FILE")
    return {**QUIET, **{name: os.environ[name] for name in names if name in os.environ}}


def _living_job(client: Any, run_dir: str) -> str | None:
    for job in client.list_jobs():
        if (job.metadata or {}).get("crescendo_run") == run_dir and not job.status.is_terminal():
            return str(job.submission_id)
    return None


def _wait_for(client: Any, job: str, stage: str, run_dir: Path) -> None:
    """Return when `job` has succeeded; a stop of this process stops the job as well."""
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
        raise Busy("E-BUSY-031", stage, problem, "run it again: it continues from the last checkpoint")


def share_inputs(root: Path, storage: Path, run_dir: Path, inputs: Sequence[str]) -> Path:
    """A folder on the shared storage that holds `inputs` at their paths, copied once a digest."""
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
    """Stand the shared storage in for what a job's package leaves out: the top folders of `paths` (data, models,
    reports) and the tracking store. What is there already stays."""
    folders = {Path(path).parts[0] for path in paths if not Path(path).is_absolute()}
    for name in folders:
        (storage / name).mkdir(parents=True, exist_ok=True)
    for name in {*folders, tracking.STORE}:
        if not os.path.lexists(root / name):
            (root / name).symlink_to(storage / name)


def run_job(run_dir: Path) -> None:
    """The other end of `run_as_job`, on the cluster."""
    body = json.loads((run_dir / JOB).read_text(encoding="utf-8"))
    module, _, function = body["worker"].partition(":")
    worker: Worker = getattr(importlib.import_module(module), function)
    profile = ComputeProfile.model_validate(body["profile"])
    try:
        execute(body["stage"], worker, body["config"], profile)
    except (PipelineError, OSError) as exc:
        artifacts.write_atomic(run_dir / FAILURE, json.dumps(_portable(exc)))
        raise


# --- The stage.


def copy_into_place(source: Path, target: Path) -> None:
    """Copy a file or folder beside `target` and rename it there; what was there is replaced as a whole."""
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary, aside = (target.with_name(f"{target.name}.{kind}-{token}") for kind in ("tmp", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_dir():
            shutil.copytree(source, temporary)
        else:
            shutil.copy2(source, temporary)
        if target.exists():
            os.rename(target, aside)
        os.rename(temporary, target)
    finally:
        for leftover in (temporary, aside):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


@dataclass
class Stage:
    """One run of one stage; made by `open_stage`.

    root: the repository. run_dir: its working state, absolute. inputs: {path: digest} of what other stages or
    the user made. tracker: its MLflow run.
    """

    name: str
    params: Params
    profile: ComputeProfile
    root: Path
    run_dir: Path
    fingerprint: str
    inputs: dict[str, str]
    tracker: tracking.StageRun
    _exported: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """What a worker gets; plain values, so that it can be sent."""
        threads = self.profile.threads or max(1, cpu_count() // max(1, self.profile.workers))
        return {
            "params": self.params.model_dump(mode="json"),
            "root": str(self.root),
            "run_dir": str(self.run_dir),
            "inputs": self.inputs,
            "precision": self.profile.precision,
            "recompute": self.profile.recompute,
            "cuda_graphs": self.profile.cuda_graphs,
            "compile": self.profile.compile,
            "threads": threads,
        }

    def finished(self) -> bool:
        """True where `run_dir/result` is there and verifies; a damaged one is made again."""
        if not (self.run_dir / "result").exists():
            return False
        try:
            artifacts.verify_directory(self.run_dir / "result")
        except StorageError as exc:
            print(f"warning: {exc}", file=sys.stderr)
            return False
        return True

    def run(self, worker: Worker, **more: Any) -> None:
        """Train: `worker(config)` in one process or many, from the last checkpoint, to `run_dir/result`. `more`
        goes into the config: plain values, paths in them below the folder of all runs."""
        config = {**self.config, **more}
        if self.finished():
            print(f"{self.name}: finished before, in {self.run_dir.name}; exporting", file=sys.stderr)
            return
        with ProgressWatch(self.name, self.run_dir, self.tracker):
            if self.profile.address and not inside_ray_job():
                run_as_job(self.name, worker, config, self.profile, list(self.inputs))
            else:
                execute(self.name, worker, config, self.profile)
        artifacts.verify_directory(self.run_dir / "result")

    def spread(
        self, make: Callable[[], AbstractContextManager[Callable[[Any], Any]]], tasks: Sequence[Any]
    ) -> Iterator[Any]:
        """`make()`'s function on every task: in this process, or on the cores of Ray; answers as they come."""
        if self.profile.workers == 0:
            with make() as work:
                yield from map(work, tasks)
            return
        with ray_session(self.profile.workers, inside_ray_job()):
            yield from map_under_ray(make, tasks)

    def export(self, mapping: Mapping[str, str]) -> None:
        """Copy folders of the run folder to outputs, each whole: {"result/model": "models/core"}."""
        for source, target in mapping.items():
            copy_into_place(self.run_dir / source, self.root / target)
            self._exported.append(target)
            numbers = self.root / target / "metrics.json"
            if numbers.is_file():
                self.log_metrics(_numbers(json.loads(numbers.read_text(encoding="utf-8"))))
                self.log_artifact(self.root / target)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers of the stage as a whole, for the tracker."""
        self.tracker.log_metrics(metrics, step)

    def log_artifact(self, path: str | Path) -> None:
        """A file or folder for the tracker."""
        self.tracker.log_artifact(self.root / path)


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in tree.items() if isinstance(value, int | float)}


def runs_folder(root: Path, profile: ComputeProfile) -> Path:
    """CRESCENDO_RUNS, else `runs` on the profile's shared storage, else `runs` in the repository."""
    given = os.environ.get(RUNS_VARIABLE)
    if given:
        return Path(given).resolve()
    return Path(profile.storage, "runs") if profile.storage else root / "runs"


def die_with_dvc() -> None:
    """Under `dvc repro`, be told to stop when DVC dies: it would leave us running beside the next repro."""
    if "DVC_STAGE" not in os.environ or threading.current_thread() is not threading.main_thread():
        return
    signal_on_parent_death(signal.SIGTERM)


def signal_on_parent_death(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # It ended before we asked.
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def open_stage(name: str, params: Params, root: Path | None = None) -> Iterator[Stage]:
    """Hold the lease of the stage's run folder and its tracking run for the block.

    Raises:
        Busy: another process runs the same stage on the same inputs.
        InputMissing, StorageError: a dependency is not there, or does not verify.
    """
    die_with_dvc()
    root = (root or Path.cwd()).resolve()
    profile = load_profile(root)
    if profile.storage and inside_ray_job():
        own = _names(_section(name, root).get("deps", [])) + outputs(name, root)
        shared = [path for path in own if not path.endswith(".py") and "://" not in path]
        link_storage(root, Path(profile.storage), shared)
    deps = dependencies(name, root)
    fingerprint = stage_fingerprint(name, root, deps)
    inputs = {path: digest for path, digest in deps.items() if not path.endswith(".py")}
    run_dir = runs_folder(root, profile) / name / fingerprint[:16]
    with artifacts.lease(run_dir / "lease"):
        fresh = not any(found for state in STATES for found in run_dir.glob(state))
        tracker = tracking.start_stage_run(
            name, root, _params_of(name, root), inputs, fingerprint=fingerprint, fresh=fresh
        )
        with tracker:
            yield Stage(name, params, profile, root, run_dir, fingerprint, inputs, tracker)
            tracker.log_outputs(
                {path: digest_path(root / path) for path in outputs(name, root) if (root / path).exists()}
            )
