"""What could keep a project from working, each with its cure: machine, packages, files, storage and servers.

A check looks at one thing, changes nothing, and yields what it found. What goes wrong within it is a finding too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import artifacts
from pipeline.compute import load_profile
from pipeline.config.params import load_params
from pipeline.errors import PipelineError, describe, one_line
from pipeline.housekeeping.leftovers import leftovers, ray_sessions
from pipeline.housekeeping.runs import run_folders, waits
from pipeline.launch import jobs, machine
from pipeline.launch.stage import runs_folder
from pipeline.overview.stages import LOCK, dvc_changes
from pipeline.processes import cpu_count
from pipeline.tracking import relocation, store
from pipeline.tracking.stage_run import LEASE

LOW_DISK = 2 * 2**30  # bytes; a demo takes half of that
SHOWN = 4  # names in a finding


class Finding(NamedTuple):
    """What a check found. fix: what to do; empty where all is well."""

    subject: str
    text: str
    fix: str = ""


Check = Callable[[Path], Iterator[Finding]]


def examine(root: Path) -> Iterator[Finding]:
    """All findings, check by check."""
    for check in CHECKS:
        subject = check.__name__.removeprefix("check_")
        try:
            yield from check(root)
        except PipelineError as error:
            yield Finding(subject, one_line(f"{error.code} {error.where}: {error.problem}"), error.fix)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user wants to know
            line = describe(error) or f"{type(error).__name__}: {error}"
            yield Finding(subject, one_line(line), "mend what it names, then run this again")


def check_python(root: Path) -> Iterator[Finding]:
    """The interpreter, and the packages of requirements.lock."""
    version = ".".join(map(str, sys.version_info[:3]))
    lock = root / machine.LOCK
    pins = machine.pins(lock)
    wrong = [f"{name} {found} ({pins[name]})" for name, found in machine.unlike_lock(lock).items()]
    if not wrong:
        yield Finding("python", f"{version}, {len(pins)} packages as in requirements.lock")
        return
    text = f"{version}, {len(wrong)} of {len(pins)} packages are not as in requirements.lock: {_some(wrong)}"
    yield Finding("python", text, "run `pip install --require-hashes -r requirements.lock`")


def check_machine(root: Path) -> Iterator[Finding]:
    """Cores, free disk, and whether torch sees the GPUs that are there."""
    free = shutil.disk_usage(root).free
    low = "free some space: `crescendo clean --dry-run` tells what can go" if free < LOW_DISK else ""
    yield Finding("machine", f"{_cores()}, {free / 2**30:.1f} GiB of disk free", low)
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding("gpu", ", ".join(names))
    elif shutil.which("nvidia-smi"):
        text = f"torch {torch.__version__} sees none, though there is a driver"
        yield Finding("gpu", text, "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that torch is a CUDA build")
    else:
        yield Finding("gpu", "none; stages run on the CPU")


def check_params(root: Path) -> Iterator[Finding]:
    """params.yaml and the compute profile."""
    load_params(root / "params.yaml")
    yield Finding("params", "params.yaml is valid")
    profile = load_profile(root)
    where = profile.address or "this machine"
    few, many = profile.min_workers, profile.max_workers
    number = f"{many or 1}" if few == many else f"{few} to {many}"
    text = f"{number} worker{'s' * (many > 1)} on {where}"
    here = profile.address is None and not profile.use_gpu
    fix = "lower `workers` in infra/compute" if here and many > cpu_count() else ""
    yield Finding("compute", text + (f", which has {_cores()}" if fix else ""), fix)


def check_dvc(root: Path) -> Iterator[Finding]:
    """Whether DVC reads its files, and what of the pipeline is stale."""
    if not (root / ".dvc").is_dir():
        yield Finding("dvc", f"{root} is no DVC project", "run `dvc init`, or change into the project")
        return
    lock = root / LOCK
    if lock.exists() and re.search(r"^(<{7}|={7}|>{7})", lock.read_text(errors="replace"), re.MULTILINE):
        fix = "run `git checkout --ours dvc.lock` (or --theirs), then `dvc repro`"
        yield Finding("dvc", f"{LOCK} holds the marks of a merge conflict", fix)
        return
    stale = dvc_changes(root)
    yield Finding("dvc", f"would run {', '.join(stale)}" if stale else "everything is fresh")


def check_git(root: Path) -> Iterator[Finding]:
    """Whether results can be traced to a commit."""
    from pipeline.tracking.runs import git_commit

    commit = git_commit(root)
    if commit is None:
        yield Finding(
            "git", "no commit can be recorded", "run `git init` and commit, or set CRESCENDO_GIT_COMMIT"
        )
    else:
        yield Finding("git", f"at {commit[:12]}")


def check_storage(root: Path) -> Iterator[Finding]:
    """Whether run folders can be written, and what killed processes left."""
    profile = load_profile(root)
    runs = runs_folder(root, profile)
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=runs) as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    yield Finding("runs", f"{runs} can be written")
    found = [*leftovers(root, runs, profile.storage is not None), *ray_sessions()]
    if found:
        names = _some([str(item.path) for item in found])
        yield Finding("leftovers", f"of killed processes: {names}", "run `crescendo clean`")


def check_tracking(root: Path) -> Iterator[Finding]:
    """The MLflow store: whether it answers, where its files lie, and what waits for it."""
    uri = store.tracking_uri(root)
    database = store.database_of(uri)
    if database is not None and not database.is_file():
        yield Finding("mlflow", "nothing was tracked yet")
        return
    if database is not None:
        yield from _database(database)
    else:
        try:
            store.connect(root, timeout=5)
        except store.failures() as error:
            fix = "check MLFLOW_TRACKING_URI, its token (MLFLOW_TRACKING_TOKEN), and that the server runs"
            yield Finding("mlflow", f"{store.public_uri(uri)}: {store.one_line_of(error)}", fix)
            return
        yield Finding("mlflow", f"{store.public_uri(uri)} answers")
    runs = run_folders(runs_folder(root, load_profile(root)))
    waiting = [str(run) for run in runs if waits(run) and not artifacts.is_held(run / LEASE)]
    if waiting:
        text = f"metrics of {len(waiting)} runs were not sent: {_some(waiting)}"
        yield Finding("mlflow", text, "run `crescendo sync`")


def _database(database: Path) -> Iterator[Finding]:
    with contextlib.closing(
        sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    ) as connection:
        answer = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if answer != "ok":
        fix = "restore it from a backup, or move it away: `crescendo sync` sends again what run folders hold"
        yield Finding("mlflow", f"{database} is damaged: {answer}", fix)
        return
    moved = relocation.moved_from(database)
    former = f"; it was moved here from {_some(moved)}, and follows at its next use" if moved else ""
    yield Finding("mlflow", f"{database}{former}")


def check_ray(root: Path) -> Iterator[Finding]:
    """The cluster of the compute profile, where it names one."""
    profile = load_profile(root)
    if profile.address is None:
        return
    yield Finding("ray", f"{profile.address} answers, Ray {jobs.cluster_version(profile.address)}")


def _cores() -> str:
    count = cpu_count()
    return f"{count} core{'s' * (count > 1)}"


def _some(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


CHECKS: tuple[Check, ...] = (
    check_python,
    check_machine,
    check_params,
    check_dvc,
    check_git,
    check_storage,
    check_tracking,
    check_ray,
)
