"""What a drill has shown: the killed run beside the quiet one, bit by bit and point by point."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifacts
from pipeline.drill.scratch import Scratch
from pipeline.launch.fingerprint import outputs
from pipeline.launch.session import LOGS
from pipeline.tracking.relocation import ARTIFACTS
from pipeline.tracking.store import STORE
from pipeline.training.records import NOTICES

TAG = "crescendo.drill."  # and the stage
Point = tuple[str, int, float | None]  # metric, step, value (None: not a number)
# Files that differ between runs, and are no leftovers: MLflow's own, and what was said.
OWN_NAMES = (ARTIFACTS, STORE, "drill.log")


@dataclass
class Receipt:
    """The findings of a drill. Times are in seconds.

    differing: result files whose bits are not those of the quiet run. missing, extra, repeated: points in MLflow
    that only the quiet run has, that only the killed one has, and that are there more than once. logged_otherwise:
    pictures and other files that are not as often in MLflow as of the quiet run. runs: statuses of the stage's runs
    in MLflow."""

    stage: str
    profile: str
    seed: int
    images: int
    asked: int
    kills: list[dict[str, Any]]
    quiet_seconds: float
    start_seconds: float
    killed_seconds: float
    digest_quiet: str
    digest_killed: str
    files: int
    differing: list[str]
    metrics: int
    points: int
    missing: list[Point]
    extra: list[Point]
    repeated: list[Point]
    logged_files: int
    logged_otherwise: list[str]
    runs: list[str]
    leftover_files: list[str]
    leftover_processes: list[str] = field(default_factory=list)

    @property
    def lost_seconds(self) -> float:
        """Time that a kill costs, start included."""
        return (self.killed_seconds - self.quiet_seconds) / max(len(self.kills), 1)

    @property
    def recoveries(self) -> list[float]:
        """Of each kill, the time to the end of the next batch, where the stage came so far."""
        return [kill["recovery"] for kill in self.kills if kill["recovery"] is not None]

    @property
    def passed(self) -> bool:
        """Whether bits are equal, and nothing is lost, doubled or left behind."""
        tracked = self.missing or self.extra or self.repeated or self.logged_otherwise
        left = self.leftover_files or self.leftover_processes
        return bool(self.kills) and self.runs == ["FINISHED"] and not (self.differing or tracked or left)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"passed": self.passed, "lost_seconds_a_kill": self.lost_seconds, **asdict(self)}

    def tag(self, commit: str | None) -> dict[str, str]:
        """A tag for a registered version: the receipt in JSON, lists by their length. commit: of the code."""
        numbers = {
            key: len(value) if isinstance(value, list) else value for key, value in self.to_json().items()
        }
        return {f"{TAG}{self.stage}": json.dumps({**numbers, "commit": commit})}

    def lines(self) -> list[str]:
        """For people."""
        where = Counter("start" if kill["image"] == 0 else "training" for kill in self.kills)
        victims = ", ".join(
            f"{n} of the {name}" for name, n in Counter(k["victim"] for k in self.kills).items()
        )
        wrong: dict[str, list[Any]] = {
            "missing": self.missing,
            "not of the quiet run": self.extra,
            "there twice": self.repeated,
            "files not as often as of the quiet run": self.logged_otherwise,
        }
        points = [f"{len(found)} {name} ({named(found)})" for name, found in wrong.items() if found]
        left = [*self.leftover_files, *self.leftover_processes]
        after = np.quantile(self.recoveries or [np.nan], [0.5, 0.95])
        equal = f"differ: {named(self.differing)}" if self.differing else f"equal, {self.files} files"
        return [
            f"drill of {self.stage}, profile {self.profile}, seed {self.seed}: {self.images} images",
            f"kills      {len(self.kills)} of {self.asked} ({victims}); {where['start']} before the first batch",
            f"time       {self.quiet_seconds:.1f} s left alone, {self.killed_seconds:.1f} s killed: "
            f"{self.lost_seconds:.1f} s lost a kill, of which a start takes {self.start_seconds:.1f} s",
            f"recovery   {after[0]:.1f} s from a kill to the next batch (median of {len(self.recoveries)}; 95%: "
            f"{after[1]:.1f} s)",
            f"bits       {equal}; sha256 {self.digest_quiet[:16]} quiet, {self.digest_killed[:16]} killed",
            f"MLflow     {self.points} points of {self.metrics} metrics, {self.logged_files} files: "
            + ("; ".join(points) or "all once, as of the quiet run")
            + f"; runs {', '.join(self.runs)}",
            f"leftovers  {named(left) or 'none'}",
            "passed" if self.passed else "FAILED",
        ]


def named(things: list[Any], at_most: int = 5) -> str:
    """The first of some things."""
    more = f", and {len(things) - at_most} more" if len(things) > at_most else ""
    return ", ".join(map(str, things[:at_most])) + more


def result_digests(scratch: Scratch) -> dict[str, str]:
    """sha256 of each file of the outputs, of the result and of the newest checkpoints."""
    run_dir = scratch.run_dir()
    assert run_dir is not None, "the stage has run"
    folders = [scratch.folder / path for path in outputs(scratch.stage, scratch.folder)] + [
        run_dir / "result"
    ]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for checkpoints in [run_dir / "checkpoints", *run_dir.glob("*/checkpoints")]:
        files += sorted(checkpoints.glob("*/state.safetensors"))[-1:]
    return {path.relative_to(scratch.folder).as_posix(): artifacts.sha256_file(path) for path in files}


def tracked(scratch: Scratch) -> tuple[Counter[Point], list[str]]:
    """How often each point is in MLflow's store, and the statuses of the stage's runs."""
    with contextlib.closing(sqlite3.connect(scratch.folder / STORE)) as store:
        rows = store.execute("SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics")
        points = Counter(tuple(row) for row in rows)
        runs = store.execute("SELECT status FROM runs WHERE name = ?", (scratch.stage,))
        return points, [status for (status,) in runs]


def files_below(folder: Path) -> set[str]:
    """Paths of the files of a scratch project, without links, and the logs that a dead daemon of Ray's leaves."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    inside = (path.relative_to(folder) for path in files if path.name != NOTICES and LOGS not in path.parts)
    return {path.as_posix() for path in inside if path.parts[0] not in OWN_NAMES}


def logged_files(scratch: Scratch) -> Counter[str]:
    """How often each picture and file is in MLflow, by its name without the run and the moment."""
    folder = scratch.folder / ARTIFACTS
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Counter(re.sub(r"^[^/]*/|\+timestamp\+[0-9]+\+[0-9a-f-]{36}", "", name) for name in names)


def differences(quiet: Scratch, killed: Scratch) -> dict[str, Any]:
    """The part of a receipt that compares two scratch projects."""
    ours, theirs = result_digests(killed), result_digests(quiet)
    points, runs = tracked(killed)
    expected, _ = tracked(quiet)
    logged, expected_files = logged_files(killed), logged_files(quiet)
    names = logged.keys() | expected_files.keys()
    return {
        "digest_quiet": artifacts.digest(theirs),
        "digest_killed": artifacts.digest(ours),
        "files": len(theirs),
        "differing": sorted(
            name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
        ),
        "metrics": len({name for name, _, _ in expected}),
        "points": len(expected),
        "missing": sorted(expected.keys() - points.keys()),
        "extra": sorted(points.keys() - expected.keys()),
        "repeated": sorted(point for point, count in points.items() if count > 1),
        "logged_files": sum(expected_files.values()),
        "logged_otherwise": sorted(name for name in names if logged[name] != expected_files[name]),
        "runs": runs,
        "leftover_files": sorted(files_below(killed.folder) - files_below(quiet.folder)),
    }
