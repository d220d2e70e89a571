"""Functions in processes of their own, forked from this one, which has imported mlflow, and so cost little.

Whoever forks never opens a store: a connection must not be shared. So all that looks at one runs here, too.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.processes import signal_on_parent_death
from pipeline.tracking import store

CONTEXT = multiprocessing.get_context("fork")
TIMEOUT = 600.0  # seconds, after which a process counts as stuck
OUTSIDE = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME")

T = TypeVar("T")


class Killed(Exception):
    """The process was killed before it had an answer."""


class Failed(Exception):
    """The process ended with an exception, whose traceback this holds."""


@dataclass
class Child(Generic[T]):
    """A process that runs a function."""

    process: Any
    answers: Connection

    def result(self, timeout: float = TIMEOUT) -> T:
        """What the function returned.

        Raises Killed where the process died by SIGKILL, Failed where the function raised, or is stuck."""
        answered = self.answers.poll(timeout)
        try:
            good, value = self.answers.recv() if answered else (False, f"no answer in {timeout:.0f} s")
        except EOFError:
            good, value = False, "no answer"
        if not answered:
            self.process.kill()
        self.process.join()
        if self.process.exitcode == -signal.SIGKILL and answered:
            raise Killed
        if not good:
            raise Failed(f"{value} (status {self.process.exitcode})")
        return value

    def kill(self) -> None:
        """Kill it now."""
        self.process.kill()


def warm_up(rehearsal: Callable[[], object], log: Path, environment: Mapping[str, str]) -> None:
    """Import here what a rehearsal imports in a fork, so that all forks after it share that."""
    for name in call(_imported_by, rehearsal, log=log, environment=environment):
        with contextlib.suppress(ImportError):  # what was put into sys.modules by hand
            importlib.import_module(name)
    store.quiet_mlflow()
    importlib.import_module("sqlalchemy.orm").configure_mappers()


def _imported_by(rehearsal: Callable[[], object]) -> list[str]:
    before = set(sys.modules)
    rehearsal()
    return [name for name in sys.modules if name not in before and name != "__main__"]


def start(
    function: Callable[..., T], *arguments: object, log: Path, environment: Mapping[str, str] | None = None
) -> Child[T]:
    """Run a function in a fork, whose words go to the file `log`; no tracking server but that of `environment`."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(there, log, environment or {}, function, arguments))
    process.start()
    there.close()
    return Child(process, here)


def call(
    function: Callable[..., T], *arguments: object, log: Path, environment: Mapping[str, str] | None = None
) -> T:
    """Run a function in a fork and wait for it. Raises as `Child.result` does."""
    return start(function, *arguments, log=log, environment=environment).result()


def _run(
    answers: Connection,
    log: Path,
    environment: Mapping[str, str],
    function: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    signal_on_parent_death(signal.SIGKILL)
    words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(words, 1)
    os.dup2(words, 2)
    for name in OUTSIDE:
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        answer = True, function(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    answers.send(answer)
