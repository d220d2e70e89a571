"""Running workers: in this process, or on Ray Train; and tasks on Ray Data."""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compute import ComputeProfile
from pipeline.errors import Busy, PipelineError
from pipeline.launch.failures import FAILURE, raise_failure, record_failure
from pipeline.launch.session import Session, ray_session
from pipeline.launch.worker import Worker, WorkerConfig
from pipeline.processes import signal_on_parent_death
from pipeline.training.records import notice

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
FEWER = (
    "fewer-workers"  # a file in a run folder that fewer workers than the profile's most have last trained in
)


def train_under_ray(
    session: Session, stage: str, worker: Worker, config: WorkerConfig, profile: ComputeProfile
) -> None:
    """Run `worker` in as many processes as `profile` says, with a process group; if one dies, all restart: as many
    as before, or, where it has a range, as many as the cluster still has room for.

    Raises:
        Busy: workers died more often than the profile allows, or Ray did.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from pipeline.launch.backend import PrivateTrainer, Workers

    scratch = config.run_dir / "ray"
    few, many = profile.workers
    if few < many:
        os.environ[START_TIMEOUT] = (
            "60"  # Then Ray counts the nodes anew; it may not have known that one is lost.
        )
    section = getattr(config.params, stage, None)
    trainer = (PrivateTrainer if session.is_private else DataParallelTrainer)(
        _RemoteWorker(worker, section and section.shards, many, profile.use_gpu),
        train_loop_config=config.to_dict(),
        backend_config=Workers(),
        scaling_config=ScalingConfig(
            num_workers=few if few == many else (few, many), use_gpu=profile.use_gpu
        ),
        run_config=RunConfig(
            name=f"{stage}-{secrets.token_hex(8)}",  # Ray resumes a run whose name it knows, even a finished one.
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=profile.max_failures),
        ),
    )
    try:
        session.run(trainer.fit)
    except TrainingFailedError as error:
        raise_failure(config.run_dir)
        if not isinstance(error, WorkerGroupError):
            raise
        raise _explain(stage, error.worker_failures, profile.max_failures) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _RemoteWorker:
    """`record_failure(worker, config)` as an object that Ray can send; it takes the config as plain values.

    It dies with its raylet: without a driver it would train on for seconds, alongside the next attempt. shards: of
    a batch, if the stage has them. workers: of the profile, at most.
    """

    worker: Worker
    shards: int | None
    workers: int
    use_gpu: bool

    def __call__(self, values: dict[str, Any]) -> None:
        from ray.train import get_context

        from pipeline.launch.meeting import meet

        signal_on_parent_death(signal.SIGKILL)
        config = WorkerConfig.from_dict(values)
        size = meet(self.shards, "nccl" if self.use_gpu else "gloo")
        rank, started = get_context().get_world_rank(), get_context().get_world_size()
        if rank == 0:
            idle = f"; {started - size} more cannot share {self.shards} shards" if size < started else ""
            _tell(config.run_dir, size, self.workers, idle)
        if rank < size:
            record_failure(self.worker, config)


def _tell(run_dir: Path, size: int, workers: int, idle: str) -> None:
    """Say how many workers train, where that is fewer than there may be, or has been."""
    fewer = run_dir / FEWER
    if size < workers or fewer.exists():
        notice(run_dir, 0, f"{size} of {workers} workers train{idle}")
    if size < workers:
        fewer.touch()
    else:
        fewer.unlink(missing_ok=True)


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
    if profile.max_workers == 0:
        worker(config)
        return
    with ray_session(profile.max_workers, config.run_dir) as session:
        train_under_ray(session, stage, worker, config, profile)
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
    session: Session, make: Callable[[], AbstractContextManager[Callable[[Any], Any]]], tasks: Sequence[Any]
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
    rows_done = iter(mapped.iter_rows())
    while row := session.run(lambda: next(rows_done, None)):
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, Exception):
            raise outcome
        yield from outcome
