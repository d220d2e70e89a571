"""A service of a tiny model in a folder, in this process."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from pipeline.serving.app import create_app
from pipeline.serving.limits import Limits
from pipeline.serving.model import Served, load_folder
from pipeline.serving.service import Service
from tests.registry.conftest import quiet_store, remake, root, write_model  # noqa: F401

ADDRESS = "http://127.0.0.1"


def client_of(service: Service, token: str | None = None) -> TestClient:
    """A client of the service's application; a context manager, which starts and ends it."""
    return TestClient(create_app(service, token), base_url=ADDRESS, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A refined model of 32 px, which upscales."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_model(folder, upscale_steps=1)
    return load_folder(folder, "cpu", folder.parent)


@pytest.fixture(scope="module")
def client(model: Served) -> Iterator[TestClient]:
    """Of a service of `model`."""
    with client_of(Service(model, Limits())) as client:
        yield client
