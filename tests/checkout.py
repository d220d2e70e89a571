"""A checkout of the repository with tiny parameters, and commands typed in it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config.strict_yaml import read_yaml
from tests.conftest import ROOT, merge_tiny

BINARIES = Path(sys.executable).parent
PROCESS = {"CRESCENDO_COMPUTE": "process"}  # without Ray, which takes seconds to start
STAGES = ["prepare", "pretrain", "finetune", "refine", "evaluate"]


def run(
    command: str, folder: Path, status: int | None = 0, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Type `command` in a shell in `folder`, with our programs on the path; check its exit status."""
    identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    # Without byte code every process would compile the checkout anew.
    dropped = ("CRESCENDO_", "MLFLOW_", "DVC_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **kept,
            **identity,
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "DVC_NO_ANALYTICS": "1",
            **env,
        },
    )
    assert status is None or done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def write_params(folder: Path, **sections: dict[str, Any]) -> None:
    """Tiny params.yaml with two octaves, with some keys of some sections changed."""
    tree = merge_tiny(read_yaml(ROOT / "params.yaml"))
    tree["data"].update(subset=["heart", "geometric"], resolution=32)
    tree["shell"]["channels"] = [16, 8]
    tree["evaluate"].update(max_calls=2000)
    for name, changes in sections.items():
        tree[name].update(changes)
    YAML(typ="safe").dump(tree, folder / "params.yaml")


def copy_checkout(folder: Path) -> Path:
    """The tracked files, tiny parameters, one commit."""
    folder.mkdir()
    run(f"git -C '{ROOT}' ls-files -z | tar -C '{ROOT}' --null -T - -c | tar x", folder)
    write_params(folder)
    run("git init -q && git add -A && git commit -qm tiny", folder)
    return folder
