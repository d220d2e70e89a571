"""Promotions in processes of their own, from project folders that share one store; also killed ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.errors import PipelineError
from pipeline.registry.promote import promote


def copy_project(root: Path, folder: Path) -> Path:
    """Another checkout: its parameters, models and reports, but no store."""
    for name in ("models", "reports"):
        shutil.copytree(root / name, folder / name)
    shutil.copy(root / "params.yaml", folder)
    return folder


def promote_all(projects: Sequence[Path], timeout: float = 240) -> list[str]:
    """Promote in all projects at once; of each `champion`, or the code of its error."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_promote, args=(project,)) for project in projects]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        assert process.exitcode == 0, process.exitcode
    return [json.loads((project / "outcome.json").read_text()) for project in projects]


def promote_and_die(project: Path, method: str, call: int, after: bool, timeout: float = 240) -> bool:
    """Promote in a process that is killed before, or right after, a call of a method of MLflow's client; whether it
    came to it."""
    process = multiprocessing.get_context("fork").Process(target=_die, args=(project, method, call, after))
    process.start()
    process.join(timeout)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _promote(project: Path) -> None:
    lines: list[str] = []
    try:
        promote(project, load_params(project / "params.yaml"), log=lines.append)
        outcome = "champion"
    except PipelineError as error:
        outcome = error.code
    (project / "outcome.json").write_text(json.dumps(outcome))


def _die(project: Path, method: str, call: int, after: bool) -> None:
    from mlflow import MlflowClient

    known = getattr(MlflowClient, method)
    calls = 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = known(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    pytest.MonkeyPatch().setattr(MlflowClient, method, dying)  # in this process alone
    _promote(project)
