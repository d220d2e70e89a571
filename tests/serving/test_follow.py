"""The alias moves: the new version is served, one that does not verify is not, and no request is dropped."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pipeline.cli import main
from pipeline.registry.package import CHAMPION, Registry, Version
from pipeline.serving import follow
from pipeline.serving.limits import Limits
from pipeline.serving.server import load_service
from tests.serving.conftest import client_of

ADDRESS = "models:/crescendo@champion"
PATH = "/v1/images/generations"


@pytest.fixture
def versions(root: Path, remake: Callable[..., str]) -> list[Version]:
    """Two of them; the second is the champion."""
    main.run(["promote"])
    remake(seed=1)
    for stage in ("refine", "finetune"):
        (root / "reports" / stage).mkdir(parents=True, exist_ok=True)
        (root / "reports" / stage / "film.png").write_bytes(stage.encode())
    main.run(["promote"])
    return [Registry(root).version("crescendo", number) for number in ("1", "2")]


def served(client: TestClient) -> str:
    answer = client.post(PATH, json={"prompt": "cat", "seed": 1})
    assert answer.status_code == 200, answer.text
    return answer.json()["version"]


@contextlib.contextmanager
def asking(client: TestClient) -> Iterator[list[int]]:
    """Statuses of requests that are sent all the time."""
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(client.post(PATH, json={"prompt": "dog", "n": 3}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield statuses
    done.set()
    for thread in threads:
        thread.join()


def damage(root: Path, version: Version) -> Callable[[], None]:
    """Change a byte of a version's weights; undoes it when it is called."""
    (path,) = (
        path
        for path in root.glob("mlartifacts/**/model.safetensors")
        if (version.digest or "-") in (path.parent / "manifest.json").read_text()
    )
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return lambda: path.write_bytes(content) and None


def test_the_alias_is_followed_and_no_request_is_dropped(
    root: Path, versions: list[Version], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    registry = Registry(root)
    service = load_service(ADDRESS, root, "cpu", Limits(), poll_seconds=3600)
    follower = service.follower
    assert follower is not None
    with client_of(service) as client, asking(client) as statuses:
        assert served(client) == "2"
        assert client.get("/v1/models").json()["data"][0]["films"] == ["finetune", "refine"]
        assert client.get("/v1/films/refine.png").content == b"refine"
        assert client.get("/v1/films/pretrain.png").status_code == 404
        registry.set_alias(versions[0], CHAMPION)
        follower.look()
        assert served(client) == "1" and client.get("/v1/models").json()["data"][0]["version"] == "1"

        undo = damage(root, versions[1])
        registry.set_alias(versions[1], CHAMPION)
        follower.look()
        assert served(client) == "1"
        refused = client.get("/readyz").json()["refused"]
        assert refused["version"] == "2" and refused["reason"].startswith("E-IO-")
        assert "version 2 is refused, crescendo version 1" in capsys.readouterr().err
        assert "crescendo_model_refusals_total 1.0" in client.get("/metrics").text

        undo()
        follower.look()  # it is not tried again at once
        assert served(client) == "1"
        monkeypatch.setattr(follow, "RETRY_SECONDS", 0)
        follower.look()
        assert served(client) == "2" and "refused" not in client.get("/readyz").json()

        monkeypatch.setattr(registry.__class__, "resolve", lambda *_: 1 / 0)
        follower.look()
        assert served(client) == "2" and client.get("/readyz").json()["registry"] == "ZeroDivisionError"
        assert "crescendo_registry_errors_total 1.0" in client.get("/metrics").text
    assert len(statuses) > 6 and set(statuses) == {200}
