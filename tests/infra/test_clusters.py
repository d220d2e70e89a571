"""The files for `ray up`, SkyPilot and Slurm fit their schemas; the script runs with Slurm's commands replaced."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from pipeline.compute import PROFILE_VARIABLE, load_profile

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra/slurm/stages.sbatch"
TEXT = {"type": "string"}
# What SkyPilot 0.14 knows of a task, as far as it is used here.
TASK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["resources", "run"],
    "properties": {
        "name": TEXT,
        "workdir": TEXT,
        "setup": TEXT,
        "run": TEXT,
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
        "secrets": {"type": "object", "additionalProperties": {"type": "null"}},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
                "use_spot": {"type": "boolean"},
                "disk_size": {"type": "integer"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {"type": "array", "items": {"type": "integer"}},
                    },
                },
            },
        },
        "file_mounts": {
            "type": "object",
            "propertyNames": {"pattern": "^/"},
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"name": TEXT, "mode": {"enum": ["COPY", "MOUNT", "MOUNT_CACHED"]}},
            },
        },
    },
}


def test_ray_knows_every_field_of_the_cluster() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = YAML(typ="safe").load(ROOT / "infra/ray/cluster.yaml")
    jsonschema.validate(cluster, json.loads(Path(ray.autoscaler.__path__[0], "ray-schema.json").read_text()))
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] == load_profile(ROOT, "cluster").max_workers
    commands = [line for key, lines in cluster.items() if key.endswith("_commands") for line in lines]
    for line in commands:
        subprocess.run(["bash", "-n", "-c", line], check=True)
        assert "ray start" not in line or "RAY_AUTH_MODE=token" in line


def test_skypilot_s_task_runs_stages_on_the_disk_of_its_profile() -> None:
    task = YAML(typ="safe").load(ROOT / "infra/skypilot/spot.yaml")
    jsonschema.validate(task, TASK)
    profile = load_profile(ROOT, task["envs"]["CRESCENDO_COMPUTE"])
    assert profile.storage in task["file_mounts"]
    assert list(task["resources"]["accelerators"].values()) == [profile.max_workers]
    assert all((ROOT / f"stages/{name}.py").is_file() for name in task["envs"]["STAGES"].split())
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)


STAGE = """
import os, signal, sys, time
def stop(number, frame): print("checkpoint", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("{name}", os.environ["CRESCENDO_COMPUTE"], flush=True)
time.sleep({seconds}); sys.exit({status})
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A project with two stages, and Slurm's environment; `scontrol` writes what it is told to `asked`."""
    for name, seconds, status in (("pretrain", 0, 0), ("finetune", 60, 0), ("refine", 0, 66)):
        file = tmp_path / "stages" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(STAGE.format(name=name, seconds=seconds, status=status))
    (tmp_path / "stages/__init__.py").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name != PROFILE_VARIABLE}
    return inherited | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "PATH": path}


def test_slurm_s_script_runs_stages_until_one_fails(slurm: dict[str, str]) -> None:
    load_profile(ROOT, "gpus")  # the script's own
    command = ["bash", SCRIPT, "pretrain", "refine", "finetune"]
    ran = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=50, check=False)
    assert (ran.returncode, ran.stdout) == (66, "pretrain gpus\nrefine gpus\n")
    assert not Path(slurm["SLURM_SUBMIT_DIR"], "asked").exists()


def test_slurm_s_signal_gives_a_checkpoint_and_queues_the_job_again(slurm: dict[str, str]) -> None:
    assert re.search(r"^#SBATCH --signal=B:TERM@\d+$", SCRIPT.read_text(), re.M)
    environment = slurm | {"CRESCENDO_COMPUTE": "process"}
    with subprocess.Popen(["bash", SCRIPT, "finetune"], env=environment, stdout=subprocess.PIPE) as job:
        assert job.stdout
        assert job.stdout.readline() == b"finetune process\n"
        time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.stdout.read() == b"checkpoint\n"
    assert job.returncode == 0
    assert Path(slurm["SLURM_SUBMIT_DIR"], "asked").read_text() == "requeue 7\n"
