"""The files for Ray Serve are what Serve, KubeRay and the application expect."""

from pathlib import Path
from typing import Any

import pytest
import yaml  # Serve and Kubernetes read YAML 1.1
from ray.serve.schema import ServeDeploySchema

from pipeline.config.strict_yaml import parse_section
from pipeline.serving.replicas import Replica, Settings

ROOT = Path(__file__).resolve().parents[2]
ON_ONE_HOST = yaml.safe_load((ROOT / "infra/serve.yaml").read_text())
SERVICE = yaml.safe_load((ROOT / "infra/kuberay/rayservice.yaml").read_text())["spec"]
ON_KUBERNETES = yaml.safe_load(SERVICE["serveConfigV2"])
CONFIGS = pytest.mark.parametrize(
    "config", [ON_ONE_HOST, ON_KUBERNETES], ids=["serve.yaml", "rayservice.yaml"]
)


def known(model: Any, given: Any) -> None:
    """Every key of `given` is a field of Serve's `model`, which itself passes over others."""
    fields = type(model).model_fields
    for key, value in given.items():
        assert key in fields, key
        own = getattr(model, key)
        for each, part in zip(own, value, strict=True) if isinstance(own, list) else [(own, value)]:
            if hasattr(type(each), "model_fields"):
                known(each, part)


@CONFIGS
def test_serve_knows_every_key(config: dict[str, Any]) -> None:
    known(ServeDeploySchema.model_validate(config), config)


@CONFIGS
def test_the_application_is_deployed_with_its_own_settings(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert (module, name) == (Replica.__module__, "application")
    settings = parse_section(Settings, application["args"], "args")
    (deployment,) = application["deployments"]
    assert deployment["name"] == Replica.__name__
    scaling = deployment["autoscaling_config"]
    assert scaling["target_ongoing_requests"] < settings.queue
    assert deployment["graceful_shutdown_timeout_s"] > settings.timeout


def test_on_one_host_it_is_not_reached_from_others() -> None:
    assert ON_ONE_HOST["http_options"]["host"] == "127.0.0.1"


def test_replicas_on_kubernetes_have_nodes_to_run_on() -> None:
    (deployment,) = ON_KUBERNETES["applications"][0]["deployments"]
    (group,) = SERVICE["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    needs, limits = deployment["ray_actor_options"], container["resources"]["limits"]
    assert needs["num_cpus"] <= int(limits["cpu"]) and needs["num_gpus"] == int(limits["nvidia.com/gpu"])
    assert deployment["autoscaling_config"]["max_replicas"] == group["maxReplicas"]
    assert (
        group["template"]["spec"]["terminationGracePeriodSeconds"] > deployment["graceful_shutdown_timeout_s"]
    )
    port = ON_KUBERNETES["http_options"]["port"]
    assert [each["containerPort"] for each in container["ports"]] == [port]
    assert f"localhost:{port}/-/healthz" in str(container["readinessProbe"])
