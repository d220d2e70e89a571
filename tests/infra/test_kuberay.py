"""The Kubernetes manifests are what Kubernetes, KubeRay, the compute profiles and the lock file expect."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml  # the manifests are for Kubernetes, which reads YAML 1.1

from pipeline.compute import load_profile

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/kuberay"
OBJECTS = {
    f"{path.name}:{found['kind']}": found
    for path in sorted(FOLDER.glob("*.yaml"))
    for found in yaml.safe_load_all(path.read_text())
}
CORE = [name for name, found in OBJECTS.items() if not found["apiVersion"].startswith("ray.io/")]
JOB, CLUSTER = OBJECTS["rayjob.yaml:RayJob"], OBJECTS["raycluster.yaml:RayCluster"]
SERVICE = OBJECTS["rayservice.yaml:RayService"]
RAY_SPECS = {
    "job": JOB["spec"]["rayClusterSpec"],
    "cluster": CLUSTER["spec"],
    "service": SERVICE["spec"]["rayClusterConfig"],
}


def exactly(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """A schema of an object with these properties and no others."""
    properties = required | optional
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


# What KubeRay knows of ray.io/v1, as far as it is used here; its pods are compared with Kubernetes' own schema.
TEXT, COUNT, FLAG, POD = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {}
STARTED = {"type": "object", "additionalProperties": TEXT}
GROUP = exactly(
    {"groupName": TEXT, "rayStartParams": STARTED, "template": POD},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
)
RAY_CLUSTER = exactly(
    {
        "rayVersion": TEXT,
        "headGroupSpec": exactly({"rayStartParams": STARTED, "template": POD}),
        "authOptions": exactly({"mode": {"enum": ["token"]}}, secretName=TEXT),
    },
    workerGroupSpecs={"type": "array", "items": GROUP},
    enableInTreeAutoscaling=FLAG,
)
RAY_JOB = exactly(
    {"entrypoint": TEXT, "rayClusterSpec": RAY_CLUSTER},
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    suspend=FLAG,
    submitterPodTemplate=POD,
)
RAY_SERVICE = exactly(
    {"serveConfigV2": TEXT, "rayClusterConfig": RAY_CLUSTER}, excludeHeadPodFromServeSvc=FLAG
)
NAMED = exactly({"name": TEXT, "namespace": {"const": "crescendo"}})
SCHEMAS = {
    kind: exactly(
        {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": NAMED, "spec": spec}
    )
    for kind, spec in (("RayJob", RAY_JOB), ("RayCluster", RAY_CLUSTER), ("RayService", RAY_SERVICE))
}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The templates of all pods."""
    for name, spec in RAY_SPECS.items():
        yield f"{name} head", spec["headGroupSpec"]["template"]
        yield from ((f"{name} {group['groupName']}", group["template"]) for group in spec["workerGroupSpecs"])
    yield "submitter", JOB["spec"]["submitterPodTemplate"]
    yield "mlflow", OBJECTS["mlflow.yaml:Deployment"]["spec"]["template"]
    yield "files", {"spec": OBJECTS["shared.yaml:Pod"]["spec"]}


PODS = dict(pods())


def validate(found: dict[str, Any]) -> None:
    """Against Kubernetes' schema, with nothing that it does not know."""
    kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", CORE)
def test_kubernetes_knows_every_object(name: str) -> None:
    validate(OBJECTS[name])


@pytest.mark.parametrize("found", [JOB, CLUSTER, SERVICE], ids=lambda found: found["kind"])
def test_kuberay_knows_every_field(found: dict[str, Any]) -> None:
    jsonschema.validate(found, SCHEMAS[found["kind"]])


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_confined_and_limited(name: str) -> None:
    validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": PODS[name]})
    pod = PODS[name]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert re.fullmatch(r"[a-z/]+:\d[\w.-]+", container["image"])
        assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        serves = name not in ("submitter", "files")
        assert not serves or {"readinessProbe", "livenessProbe"} <= container.keys()


def test_a_node_s_probes_ask_the_ports_that_ray_has_by_default() -> None:
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, DEFAULT_DASHBOARD_PORT

    for spec in RAY_SPECS.values():
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        asked = re.findall(r"localhost:(\d+)", str(head["readinessProbe"]))
        assert asked == [str(DEFAULT_DASHBOARD_AGENT_LISTEN_PORT), str(DEFAULT_DASHBOARD_PORT)]


def test_the_job_runs_a_stage() -> None:
    python, flag, module = JOB["spec"]["entrypoint"].split()
    assert (python, flag) == ("python", "-m")
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("spec", RAY_SPECS.values(), ids=RAY_SPECS)
def test_a_ray_cluster_fits_its_compute_profile_and_the_locked_ray(spec: dict[str, Any]) -> None:
    environment = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]
    profile = load_profile(ROOT, environment["CRESCENDO_COMPUTE"])
    (group,) = spec["workerGroupSpecs"]
    if spec is not RAY_SPECS["service"]:  # which runs no stage
        assert (group["minReplicas"], group["maxReplicas"]) == profile.workers
        for template in (spec["headGroupSpec"]["template"], group["template"]):
            (container,) = template["spec"]["containers"]
            assert profile.storage in {mount["mountPath"] for mount in container["volumeMounts"]}
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert locked
    assert spec["rayVersion"] == locked[1]


def test_secrets_are_only_named() -> None:
    assert not [name for name in OBJECTS if name.endswith(":Secret")]
    for name, pod in PODS.items():
        for variable in (
            each for container in pod["spec"]["containers"] for each in container.get("env", [])
        ):
            assert not re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", variable["name"]), name
