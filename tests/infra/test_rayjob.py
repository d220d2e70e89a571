"""The KubeRay manifest and the compute profiles are what the code and the lock file expect."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml  # the manifest is for Kubernetes, which reads YAML 1.1

from pipeline.compute import load_profile

ROOT = Path(__file__).resolve().parents[2]
JOB = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())


def test_the_manifest_runs_a_stage_on_the_locked_ray() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = JOB["spec"]
    python, flag, module = spec["entrypoint"].split()
    assert (python, flag) == ("python", "-m")
    assert importlib.util.find_spec(module)
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert locked
    assert spec["rayClusterSpec"]["rayVersion"] == locked[1]


def test_the_manifest_fits_its_compute_profile() -> None:
    cluster, spec = JOB["spec"]["rayClusterSpec"], JOB["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    profile = load_profile(ROOT, environment["CRESCENDO_COMPUTE"])
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == profile.workers
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        assert profile.storage in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["securityContext"]["runAsNonRoot"]
    assert cluster["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("path", sorted((ROOT / "infra/compute").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_compute_profile_loads(path: Path) -> None:
    load_profile(ROOT, path.stem)
