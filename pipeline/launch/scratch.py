"""Projects beside the user's own, in which stages run for a drill, a rehearsal or a reproduction: what they share
with it, and what their processes are told. They have runs and a tracking store of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.compute import PROFILE_VARIABLE
from pipeline.launch.session import inside_ray_job
from pipeline.launch.stage import RUNS_VARIABLE
from pipeline.tracking.store import STORE

CODE = ("pipeline", "stages", "infra", "dvc.yaml", "requirements.lock")  # what stages read of a project
DROPPED = ("CRESCENDO_", "MLFLOW_", "DVC_")


def lay_out(folder: Path, root: Path, names: Iterable[str] = CODE) -> None:
    """Make a project in `folder`, with links to some files and folders of the one in `root`."""
    folder.mkdir(parents=True)
    for name in names:
        link(folder / name, root / name)


def link(place: Path, target: Path) -> None:
    """Take a file or folder of a project as it is."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target.absolute())


def write_params(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write params.yaml."""
    YAML(typ="safe").dump(dict(tree), folder / "params.yaml")


def command(stage: str, python: str | Path = sys.executable) -> list[str]:
    """The command line of a stage."""
    return [str(python), "-m", f"stages.{stage}"]


def environment(folder: Path, profile: str) -> dict[str, str]:
    """That of the processes of the project in `folder`: no server, cluster or run folder of the user's."""
    dropped = DROPPED if inside_ray_job() else (*DROPPED, "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **kept,
        PROFILE_VARIABLE: profile,
        RUNS_VARIABLE: str(folder / "runs"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / STORE}",
    }
