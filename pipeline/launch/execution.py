"""Running workers: in this process, or on Ray Train; and tasks on Ray Data."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pipeline.compute import ComputeProfile
from pipeline.errors import Busy, PipelineError
from pipeline.launch.failures import FAILURE, raise_failure, record_failure
from pipeline.launch.worker import Worker, WorkerConfig
from pipeline.processes import signal_on_parent_death

RAY_ENV = {
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
    """Make Ray processes authenticate each other by a token, unless RAY_AUTH_MODE is set.

    Must run before ray is imported, which reads the mode once. Without a token in the environment Ray would
    create one and leave it in ~/.ray/auth_token.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def ray_session(workers: int, inside_job: bool) -> Iterator[None]:
    """A private, quiet Ray on this machine or, inside a job, the cluster's Ray."""
    import logging

    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    if not inside_job:
        require_token()
    import ray

    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
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
    if main and handler is not None:
        signal.signal(signal.SIGTERM, handler)  # ray.init installs one that exits without unwinding.
    try:
        logging.getLogger("ray").setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()


def inside_ray_job() -> bool:
    """True in the driver of a Ray job, which has a cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def train_under_ray(stage: str, worker: Worker, config: WorkerConfig, profile: ComputeProfile) -> None:
    """Run `worker` in `profile.workers` processes with a process group; if one dies, all restart.

    Raises:
        Busy: workers died more often than the profile allows.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchTrainer

    scratch = config.run_dir / "ray"
    trainer = TorchTrainer(
        _RemoteWorker(worker),
        train_loop_config=config.to_dict(),
        scaling_config=ScalingConfig(num_workers=profile.workers, use_gpu=profile.use_gpu),
        run_config=RunConfig(
            name=f"{stage}-{secrets.token_hex(8)}",  # Ray resumes a run whose name it knows, even a finished one.
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=profile.max_failures),
        ),
    )
    try:
        _in_thread(trainer.fit)
    except TrainingFailedError as error:
        raise_failure(config.run_dir)
        if not isinstance(error, WorkerGroupError):
            raise
        raise _explain(stage, error.worker_failures, profile.max_failures) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _in_thread(work: Callable[[], object]) -> None:
    """Run `work` in a thread: in the main thread Ray's `fit` takes over Ctrl-C and exits with status 1."""
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
    """`record_failure(worker, config)` as an object that Ray can send; it takes the config as plain values.

    It dies with its raylet: without a driver it would train on for seconds, alongside the next attempt.
    """

    worker: Worker

    def __call__(self, config: dict[str, Any]) -> None:
        signal_on_parent_death(signal.SIGKILL)
        record_failure(self.worker, WorkerConfig.from_dict(config))


def _explain(stage: str, failures: Mapping[int, Exception], max_failures: int) -> Exception:
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    # A dead worker breaks the collectives of its peers; their errors only follow from that.
    death = (RayActorError, WorkerHealthCheckFailedError)
    dead = sorted(rank for rank, error in failures.items() if isinstance(error, death))
    if dead or not failures:
        problem = f"worker {', '.join(map(str, dead)) or '?'} died, after {max_failures} restarts"
        fix = "free memory if it ran out, and run the same command again to continue from the last checkpoint"
        return Busy("E-BUSY-030", stage, problem, fix)
    rank, error = min(failures.items())
    return RuntimeError(f"training worker {rank} failed:\n{error}")


def execute(stage: str, worker: Worker, config: WorkerConfig, profile: ComputeProfile) -> None:
    """Run `worker` in this process or on Ray: the cluster's inside a job, otherwise a private one."""
    (config.run_dir / FAILURE).unlink(missing_ok=True)
    if profile.workers == 0:
        worker(config)
        return
    with ray_session(profile.workers, inside_ray_job()):
        train_under_ray(stage, worker, config, profile)
    raise_failure(config.run_dir)


def _run_tasks(
    batch: dict[str, Any], make: Callable[[], AbstractContextManager[Callable[[Any], Any]]]
) -> dict[str, Any]:
    """One batch of `map_under_ray`, in a process of its own: results, or the error, as pickles.

    An error is returned, since Ray Data raises its own without the cause.
    """
    signal_on_parent_death(signal.SIGKILL)
    try:
        with make() as work:
            outcome: Any = [work(task) for task in batch["task"]]
    except (PipelineError, OSError) as error:
        outcome = error
    return {"outcome": [pickle.dumps(outcome)]}


def map_under_ray(
    make: Callable[[], AbstractContextManager[Callable[[Any], Any]]], tasks: Sequence[Any]
) -> Iterator[Any]:
    """Map `make()`'s function over tasks, one at a time per core of the cluster; yields results as they finish.

    A task whose worker dies is repeated. A PipelineError or OSError of a task is raised here unchanged.
    """
    import logging

    import ray
    from ray.data import DataContext, TaskPoolStrategy, from_items

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    concurrency = min(cores, len(tasks))  # Ray warns if it exceeds the number of tasks.
    rows = from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    mapped = rows.map_batches(
        _run_tasks,
        fn_kwargs={"make": make},
        batch_size=1,
        compute=TaskPoolStrategy(size=concurrency),
        num_cpus=1,
    )
    for row in mapped.iter_rows():
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, Exception):
            raise outcome
        yield from outcome
