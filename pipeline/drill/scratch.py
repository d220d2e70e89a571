"""A scratch project for a drill: the user's code, profiles and data by links; own parameters and outputs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.launch import scratch as layout
from pipeline.launch.fingerprint import outputs

TOKEN = "CRESCENDO_DRILL"  # in the environment of all processes of a scratch project


@dataclass(frozen=True)
class Scratch:
    """A project in `folder` in which `stage` runs under a compute profile, tracked in a store of its own."""

    folder: Path
    stage: str
    profile: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def log(self) -> Path:
        """What the processes of the stage say."""
        return self.folder / "drill.log"

    @property
    def environment(self) -> dict[str, str]:
        """That of its processes, by which they are found."""
        # SPT_NOENV: Ray's workers would write their titles over it.
        return layout.environment(self.folder, self.profile) | {TOKEN: self.token, "SPT_NOENV": "1"}

    def run_dir(self) -> Path | None:
        """The stage's run folder, if there is one by now."""
        return next(self.folder.glob(f"runs/{self.stage}/*/"), None)

    def processes(self) -> list[int]:
        """Ids of the processes that are alive and belong to this project."""
        return [pid for pid in all_processes() if f"{TOKEN}={self.token}" in environment_of(pid)]


def make_scratch(scratch: Scratch, root: Path, params: Mapping[str, Any]) -> None:
    """Lay out a project for a drill of the one in `root`, with these parameters."""
    layout.lay_out(scratch.folder, root, (*layout.CODE, "data"))
    made = {Path(path) for path in outputs(scratch.stage, root)}
    for model in (root / "models").glob("*/"):
        if model.relative_to(root) not in made:
            layout.link(scratch.folder / "models" / model.name, model)
    layout.write_params(scratch.folder, params)


def all_processes() -> list[int]:
    """Ids of all processes."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def environment_of(pid: int) -> list[str]:
    """The environment that a process was started with; nothing of one that has ended, or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def title_of(pid: int) -> str:
    """The command line of a process, which Ray's workers replace by what they do."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""
