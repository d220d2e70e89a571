"""The application under Ray Serve: two replicas on this machine, as `infra/serve.yaml` starts them."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.chaos.ray_cluster import PATH, free_port
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.inference.generator import load_generator
from pipeline.launch.session import PRIVATE_ENV
from pipeline.registry.package import CHAMPION, Registry
from pipeline.serving.replicas import application

ROOT = Path(__file__).parents[2]
TOKEN, RAY_TOKEN = "a-token-of-some-length", "0" * 64


@pytest.mark.parametrize(
    ("args", "token", "error"),
    [
        ({}, None, "E-CFG-140 CRESCENDO_TOKEN: is not set"),
        ({}, "short", "E-CFG-132"),
        ({"modle": "x"}, TOKEN, "E-CFG-001 args: modle: unknown key"),
        ({"queue": 0}, TOKEN, "E-CFG-00. args: queue"),
    ],
)
def test_what_cannot_be_deployed_is_one_line(
    args: dict, token: str | None, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CRESCENDO_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("CRESCENDO_TOKEN", token)
    with pytest.raises(PipelineError, match=error):
        application(args)


@contextlib.contextmanager
def serve_run(config: Path, port: int) -> Iterator[tuple[httpx.Client, Path]]:
    """`serve run` with a configuration: a client of it once it is ready, and Ray's folder. What it prints is beside
    the configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    with contextlib.ExitStack() as stack:
        # Sockets have short paths, and another Ray of this machine is not joined.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))
        own = {"PATH": PATH, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder, "CRESCENDO_TOKEN": TOKEN}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RAY_TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        patience = {
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "50",
        }
        out = stack.enter_context(open(config.with_suffix(".out"), "wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(config)],
            env={**kept, **PRIVATE_ENV, **own, **token, **patience},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120)
            stack.enter_context(client)
            printed = config.with_suffix(".out")
            until(lambda: process.poll() is not None or answers(client, "/readyz"), 300, printed)
            assert process.poll() is None, printed.read_text()
            yield client, Path(folder)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers(client: httpx.Client, path: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return client.get(path, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def until(ready: Callable[[], bool], seconds: float, what: Path) -> None:
    """Wait. Fails with the contents of a file."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, what.read_text()
        time.sleep(0.5)


def drawn(client: httpx.Client, seed: int, n: int = 1) -> tuple[str, bytes]:
    """Version and first file of a request for images."""
    body = {"prompt": "cat", "seed": seed, "n": n, "steps": 1}
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    image, *_ = answer.json()["data"]
    content = base64.b64decode(image["b64_json"])
    assert client.get(image["url"]).content == content  # whichever replica is asked
    return answer.json()["version"], content


def deploy(config: dict[str, Any], printed: Path) -> None:
    """What `serve deploy` does."""
    found = re.search(r"dashboard at.*?(http://[\d.:]+)", printed.read_text())
    assert found is not None
    headers = {"Authorization": f"Bearer {RAY_TOKEN}"}
    httpx.put(
        f"{found[1]}/api/serve/applications/", json=config, headers=headers, timeout=60
    ).raise_for_status()


@pytest.mark.ray
@pytest.mark.slow
def test_two_replicas_serve_the_same_pixels_follow_the_alias_and_finish_what_they_began(
    root: Path, remake: Callable[..., str]
) -> None:
    main.run(["promote"])
    expected = load_generator(root / "models/refined").images(["cat"] * 15, range(15), 1)
    remake(seed=1)
    main.run(["promote"])
    config = yaml.safe_load((ROOT / "infra/serve.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["args"]["poll"] = 0.5
    replica = config["applications"][0]["deployments"][0]
    replica |= {"ray_actor_options": {"num_cpus": 0.5}, "num_replicas": 2}
    del replica["autoscaling_config"]
    place = root / "serve.json"
    place.write_text(json.dumps(config))
    printed = place.with_suffix(".out")
    with serve_run(place, port) as (client, folder), ThreadPoolExecutor(8) as pool:
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        assert {version for version, _ in pool.map(lambda i: drawn(client, i), range(15))} == {"2"}
        Registry(root).set_alias(Registry(root).version("crescendo", "1"), CHAMPION)
        until(lambda: {drawn(client, i)[0] for i in range(6)} == {"1"}, 60, printed)
        served = pool.map(lambda i: drawn(client, i), range(15))
        for (version, content), image in zip(served, expected, strict=True):
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
            assert version == "1" and torch.equal(pixels, image)
        logs = folder.glob("**/replica_crescendo_Replica_*.log")
        assert sum("POST /v1/images/generations 200" in each.read_text() for each in logs) == 2
        # Fewer images than the queue of one replica holds, as one may get all of them.
        late = [pool.submit(drawn, client, seed, 7) for seed in range(8)]
        time.sleep(0.2)
        replica["num_replicas"] = 1
        deploy(config, printed)
        assert all(each.result()[0] == "1" for each in late)
        until(
            lambda: printed.read_text().count("Removing 1 replica from Deployment(name='Replica'") == 1,
            60,
            printed,
        )
