"""The image and the services beside it: linted, and compared with schemas and with the commands that they run."""

import configparser
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.compute import load_profile

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/docker"
COMPOSE = YAML(typ="safe").load(FOLDER / "compose.yaml")
SERVICES = COMPOSE["services"]
MLFLOW = Path(str(importlib.util.find_spec("mlflow").origin)).parent


def test_the_dockerfile_is_linted() -> None:
    linted = subprocess.run(["hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_the_image_is_pinned_locked_and_not_root_s() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.M)
    assert len(stages) == 2
    assert len(set(stages)) == 1
    assert re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", stages[0])
    assert "--require-hashes -r requirements.lock" in text
    assert re.findall(r"^USER (\S+)", text, re.M) == ["1000:1000"]
    assert "HEALTHCHECK" in text


def test_the_image_gets_what_a_stage_reads_and_nothing_else() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert kept >= {"pipeline", "stages", "presets", "params.yaml", "dvc.yaml", "infra/compute"}
    assert not kept & {"data", "models", "runs", "reports", "infra", ".git", ".dvc"}


def test_compose_knows_every_field() -> None:
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", FOLDER / "compose.yaml"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_every_service_is_pinned_confined_and_limited(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z/]+:\d[\w.-]+", service["image"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory", "pids"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "healthcheck" in service or service["profiles"] == ["stage"]
    example = (FOLDER / "secrets.example").read_text()
    for name, value in service["environment"].items():
        if re.search("PASSWORD|SECRET|TOKEN", name):
            reference = re.fullmatch(r"\$\{(\w+):\?see infra/docker/secrets\.example\}", value)
            assert reference
            assert f"\n{reference[1]}=\n" in example


def test_the_stages_have_compute_profiles() -> None:
    for name in ("stage", "gpu-stage"):
        load_profile(ROOT, SERVICES[name]["environment"]["CRESCENDO_COMPUTE"])


def test_mlflow_knows_the_servers_options() -> None:
    kuberay = YAML(typ="safe").load_all(ROOT / "infra/kuberay/mlflow.yaml")
    deployment = next(each for each in kuberay if each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    known = "".join((MLFLOW / name).read_text() for name in ("cli/__init__.py", "utils/cli_args.py"))
    for command in (shlex.split(SERVICES["mlflow"]["command"]), container["command"] + container["args"]):
        assert command[:2] == ["mlflow", "server"]
        options = {word.partition("=")[0] for word in command if word.startswith("--")}
        assert options >= {"--backend-store-uri", "--app-name", "--allowed-hosts", "--artifacts-destination"}
        assert all(f'"{option}' in known for option in options)


def test_mlflow_s_accounts_have_its_own_keys() -> None:
    shipped, ours = configparser.ConfigParser(), configparser.ConfigParser()
    shipped.read(MLFLOW / "server/auth/basic_auth.ini")
    ours.read(FOLDER / "basic_auth.ini")
    assert set(ours["mlflow"]) <= set(shipped["mlflow"])
    assert ours["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert "password" not in ours["mlflow"]["database_uri"]
