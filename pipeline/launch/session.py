"""A private Ray on this machine, or that of the cluster whose job this process is.

The private one listens at 127.0.0.1, asks for a token, and keeps its files in a folder of its own, which is
removed at the end. If one of its daemons dies, that is one line.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import STOPPED, Busy
from pipeline.launch.session_folder import session_folder
from pipeline.processes import cpu_count, users_of

T = TypeVar("T")

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
# Of a private Ray: its servers, and those of gloo and NCCL, listen at 127.0.0.1. The first is what Ray has for
# systems whose firewalls ask about others. Nobody takes its node away, so that no process need watch for that.
PRIVATE_ENV = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
LOGS = "ray-logs"
DAEMONS = ("gcs_server", "raylet")  # without which Ray does not go on


def require_token() -> None:
    """Make Ray processes authenticate each other by a token, unless RAY_AUTH_MODE is set.

    Must run before ray is imported, which reads the mode once. Without a token in the environment Ray would
    create one and leave it in ~/.ray/auth_token.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def inside_ray_job() -> bool:
    """True in the driver of a Ray job, which has a cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


class RayDied(Busy):
    """A daemon of Ray died, or did not start."""


@dataclass(frozen=True)
class Session:
    """A Ray that this process is connected to. daemons: of a private one, {pidfd: name}."""

    run_dir: Path
    daemons: Mapping[int, str]

    @property
    def is_private(self) -> bool:
        """Whether it is this process's own, and not a cluster's."""
        return bool(self.daemons)

    def run(self, work: Callable[[], T]) -> T:
        """`work()`, in a thread: in the main one Ray's `fit` takes over Ctrl-C and exits with status 1, and no
        signal ends a wait for a dead daemon.

        Raises RayDied as soon as a daemon is dead, unless the work is done."""
        outcome: Future[T] = Future()
        ended, end = os.pipe()

        def call() -> None:
            try:
                outcome.set_result(work())
            except BaseException as exc:
                outcome.set_exception(exc)
            finally:
                os.close(end)

        threading.Thread(target=call, name="ray-call", daemon=True).start()
        try:
            connection.wait([ended, *self.daemons])
        finally:
            os.close(ended)
        ready = connection.wait(list(self.daemons), 0)
        dead = [name for pidfd, name in self.daemons.items() if pidfd in ready]
        if dead and (not outcome.done() or outcome.exception()):
            fix = "free memory if it ran out, and run the same command again to continue"
            problem = f"{' and '.join(dead)} died; the logs are in {self.run_dir / LOGS}"
            raise RayDied("E-BUSY-033", "Ray on this machine", problem, fix)
        return outcome.result()


@contextlib.contextmanager
def ray_session(workers: int, run_dir: Path) -> Iterator[Session]:
    """A private, quiet Ray on this machine or, inside a job, the cluster's Ray.

    What Ray prints goes to `run_dir/ray.log`, and its logs, if one of its daemons dies, to `run_dir/ray-logs`."""
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    with contextlib.ExitStack() as stack:
        if inside_ray_job():
            stack.enter_context(_connection(address="auto"))
            yield Session(run_dir, {})
            return
        require_token()
        for key, value in PRIVATE_ENV.items():
            os.environ.setdefault(key, value)
        os.environ.pop("RAY_ADDRESS", None)
        printed = stack.enter_context(open(run_dir / "ray.log", "a", encoding="utf-8"))
        folder = stack.enter_context(session_folder())
        stack.enter_context(contextlib.redirect_stdout(printed))
        cores, memory = max(workers, cpu_count()), 80 * 2**20
        how = {"num_cpus": cores, "object_store_memory": memory, "include_dashboard": False}
        try:
            stack.enter_context(_connection(address="local", _temp_dir=str(folder), **how))
            own = {pid: name for pid, name in users_of(folder).items() if name in DAEMONS}
            session = Session(run_dir, {os.pidfd_open(pid): name for pid, name in own.items()})
            for pidfd in session.daemons:
                stack.callback(os.close, pidfd)
            yield session
        except RayDied:
            with contextlib.suppress(OSError):  # of a file that its writer has just removed
                shutil.copytree(folder / "session_latest/logs", run_dir / LOGS, dirs_exist_ok=True)
            raise


@contextlib.contextmanager
def _connection(**how: Any) -> Iterator[None]:
    """`ray.init(...)` for the block."""
    import logging

    import ray

    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **how)
    except Exception as error:  # noqa: BLE001 - what Ray raises where its daemons do not start in time
        fix = "run the same command again, when this machine has less to do"
        raise RayDied("E-BUSY-034", "Ray", f"did not start: {error}", fix) from error
    if main and handler is not None:
        signal.signal(signal.SIGTERM, handler)  # ray.init installs one that exits without unwinding.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield
    except (RayDied, KeyboardInterrupt):
        # Shutting down would wait for the dead, or for tasks, and so would Ray's threads at the end of Python.
        atexit.unregister(ray.shutdown)
        atexit.register(_leave)
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED)
