"""Every command that the documentation prints is typed in a tiny project, except those that no test can run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.evaluation.verdict import Baseline
from tests.checkout import BINARIES, copy_checkout
from tests.conftest import ROOT, write_prepared
from tests.registry.conftest import write_model, write_verdict
from tests.test_docs import HISTORY, name_of

pytestmark = pytest.mark.slow

# The registry's page first: its commands name versions as they are before others move the aliases.
PAGES = [
    ROOT / "docs/registry.md",
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "registry.md"),
    ROOT / "infra/README.md",
]
PROGRAMS = (
    *(
        "crescendo",
        "dvc",
        "make",
        "python",
        ".venv/bin/python",
        ".",
        "mlflow",
        "git",
        "curl",
        "mkdir",
        "export",
    ),
    *("docker", "kubectl", "ray", "serve", "ssh", "sky", "sbatch", "umask", "cd"),
)
# What no test can run, by how it begins, and why.
LEFT_OUT = {
    "make": "installs environments, trains, or runs all tests",
    ".": "tests have an environment",
    "export": "means something to the shell it is typed in",
    "mlflow ui": "runs until it is stopped",
    "crescendo serve": "runs until it is stopped; tests/serving",
    "CRESCENDO_TOKEN=": "runs until it is stopped; tests/serving",
    "curl": "asks a service; tests/serving",
    "dvc repro": "trains; tests/test_pipeline.py",
    "dvc exp run": "trains; tests/test_pipeline.py",
    "crescendo plan": "rehearses all stages; tests/test_pipeline.py",
    "crescendo drill": "kills for minutes; tests/drill",
    "crescendo reproduce": "trains, from a commit; tests/reproduce",
    "crescendo copy": "needs another store; tests/registry/test_copying.py",
    "crescendo sign": "needs a key; tests/registry/test_copying.py",
    "MLFLOW_TRACKING_URI=": "needs another store; tests/registry/test_copying.py",
    "crescendo export": "takes half a minute; tests/export",
    "python exported/emoji/generate.py": "is made by `crescendo export`; tests/export",
    "CRESCENDO_COMPUTE=": "needs GPUs or a cluster",
    "python -m benchmarks.": "measures for minutes",
    "docker": "needs Docker; tests/infra",
    "kubectl": "needs Kubernetes; tests/infra",
    "ray": "needs a cluster; tests/launch",
    "serve": "needs Ray Serve; tests/serving",
    "(umask 077; ray": "writes a token into the home folder",
    "(umask 077; echo CRESCENDO_TOKEN=": "writes a token",
    "ssh": "needs another machine",
    "sky": "needs an account at a cloud; tests/infra",
    "sbatch": "needs Slurm; tests/infra",
    ".venv/bin/python": "tests have another environment",
}
# Exit statuses beside 0: findings of a doctor are no failure of the command.
STATUSES = {"crescendo doctor": (78,)}


def commands_of(text: str) -> list[str]:
    """Commands in the indented blocks of a page that begin with one of PROGRAMS, without comments."""
    assert "```" not in text, "blocks are indented"
    found = []
    for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", re.sub(r"^ {4}", "", block, flags=re.MULTILINE)).splitlines()
        if program_of(lines[0]) in PROGRAMS:
            assert all(program_of(line) in PROGRAMS for line in lines if line), block
            found += [re.sub(r"\s+#\s.*", "", line) for line in lines]
    return found


def program_of(line: str) -> str:
    """The word of a command line that names what is run, after variables and brackets."""
    words = re.sub(r"^([A-Z_]+=(\$\([^)]*\)|\S*) +)*", "", line.lstrip("(")).split()
    return words[0].rstrip(";") if words else ""


def left_out(command: str) -> list[str]:
    """The keys of LEFT_OUT that a command begins with, as words or with `=` or `.` at the end."""
    return [
        key
        for key in LEFT_OUT
        if f"{command} ".startswith(key if key[-1] in "=." and key != "." else f"{key} ")
    ]


COMMANDS = {
    name_of(page): commands_of(page.read_text(encoding="utf-8"))
    for page in PAGES
    if name_of(page) not in HISTORY
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout as after training: prepared data, models, reports, and three champions, the last of version 3."""
    folder = copy_checkout(tmp_path_factory.mktemp("commands") / "checkout")
    write_prepared(folder / "data/prepared", resolution=32, low_resolution=16)
    for stage in ("pretrain", "finetune", "refine"):
        (folder / "reports" / stage).mkdir(parents=True)
        (folder / "reports" / stage / "metrics.json").write_text('{"held_out_error": 0.1}')
        (folder / "reports" / stage / "curves.csv").write_text("nimg,loss,error\n8,0.5,0.5\n16,0.4,0.4\n")
    (folder / "data/raw/red").mkdir(parents=True)
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"data/raw/red/{number}.png")
    shutil.copy(folder / "data/raw/red/0.png", folder / "photo.png")
    write_model(folder / "models/core", kind="finetuned")
    write_model(folder / "models/finetuned", kind="finetuned", bands=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.evaluation.judging.recompute", lambda claimed, *_: claimed)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("CRESCENDO_COMPUTE", "process")
        patch.setenv("DVC_NO_ANALYTICS", "1")
        patch.setenv("RAY_TMPDIR", str(folder.parent))  # where `crescendo clean` looks for what Ray left
        patch.setenv("PATH", f"{BINARIES}:{os.environ['PATH']}")
        patch.chdir(folder)
        before = Baseline("models/finetuned", "c" * 64)
        for seed in range(3):
            digest = write_model(folder / "models/refined", seed=seed, upscale_steps=1)
            write_verdict(folder, digest, baseline=before)
            assert main.run(["promote"]) == 0
            before = Baseline(f"models:/crescendo/{seed + 1}", digest)
        assert main.run(["generate", "red heart", "--num", "1", "--out", "picture.png"]) == 0
        yield folder


def type_in(command: str) -> int:
    """Run a command in this process if it is Python's, which is quicker, else in a shell; its exit status."""
    from dvc.cli import main as dvc

    program, *arguments = shlex.split(command)
    if program == "crescendo":
        return main.run(arguments)
    if program == "dvc":
        return int(dvc(arguments))
    return subprocess.run(command, shell=True, check=False).returncode


@pytest.mark.parametrize("page", COMMANDS)
def test_every_printed_command_runs(project: Path, page: str, capfd: pytest.CaptureFixture[str]) -> None:
    earlier = {command for each in list(COMMANDS)[: list(COMMANDS).index(page)] for command in COMMANDS[each]}
    params = (project / "params.yaml").read_bytes()
    for command in dict.fromkeys(COMMANDS[page]):
        if command in earlier or left_out(command):
            continue
        status = type_in(command)
        said = capfd.readouterr()
        assert status in (0, *STATUSES.get(command, ())), f"{command}\n{said.out}\n{said.err}"
        (project / "params.yaml").write_bytes(params)


def test_what_is_left_out_is_printed_somewhere() -> None:
    used = {key for commands in COMMANDS.values() for command in commands for key in left_out(command)}
    assert used == set(LEFT_OUT)
    assert sum(map(len, COMMANDS.values())) > 60, "commands are found"
