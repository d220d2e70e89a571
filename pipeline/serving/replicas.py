"""The same application under Ray Serve, where one process is outgrown: replicas of it, each with its own model and
batches, which follow the alias by themselves.

`infra/serve.yaml` names `application`. Images that are given by URL are in one place for all replicas, since a URL
may be asked of another one. Serve's proxies may listen beyond this machine, so that requests need a token always.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.config.strict_yaml import Section, parse_section
from pipeline.errors import ConfigError
from pipeline.project import find_root
from pipeline.serving.limits import ImageStore, Limits
from pipeline.serving.server import TOKEN, environment_token, load_service, registered_champion

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp

Positive = Annotated[float, Field(gt=0)]


class Settings(Section):
    """The application's `args`: the options of `crescendo serve`, for each replica."""

    model: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    poll: Positive = 5.0
    queue: Annotated[int, Field(gt=0)] = 64
    timeout: Positive = 120.0
    rate: Positive | None = None


class SharedImages:
    """Images in the `ImageStore` of all replicas."""

    def __init__(self, store: Any) -> None:
        self._store = store  # a handle of Serve

    async def add(self, content: bytes) -> str:
        """See `ImageStore.add`."""
        return str(await self._store.add.remote(content))

    async def get(self, name: str) -> bytes | None:
        """See `ImageStore.get`."""
        content: bytes | None = await self._store.get.remote(name)
        return content


class Replica:
    """One process of the application. Needs a project at its working directory, and a token in its environment."""

    def __init__(self, settings: Settings, store: Any) -> None:
        root = find_root()
        limits = Limits(settings.queue, settings.timeout, settings.rate)
        model = settings.model or registered_champion(root)
        self._service = load_service(model, root, settings.device, limits, settings.poll)
        self._service.images = SharedImages(store)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve, which then starts the application."""
        from pipeline.serving.app import create_app

        return create_app(self._service, required_token())


def required_token() -> str:
    """The token of the environment. Raises ConfigError where there is none, or one that can be guessed."""
    token = environment_token()
    if token is None:
        problem, fix = "is not set", f"export {TOKEN}=$(openssl rand -hex 16) where Ray is started"
        raise ConfigError("E-CFG-140", TOKEN, problem, fix)
    return token


def application(args: dict[str, Any]) -> Application:
    """What Serve deploys: any number of `Replica`, and one `ImageStore`. Raises ConfigError for `args` that
    `Settings` does not have, and without a token."""
    from ray import serve

    settings = parse_section(Settings, args, "args")
    required_token()
    store = serve.deployment(ImageStore, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    limits = {"max_ongoing_requests": settings.queue, "max_queued_requests": settings.queue}
    replica = serve.deployment(serve.ingress()(Replica), name="Replica", **limits)
    return replica.bind(settings, store.bind())
