"""One process that serves: the model, its application, and the socket that it listens on."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from pipeline.config.params import load_params
from pipeline.errors import AccessError, Busy, ConfigError
from pipeline.project import locate
from pipeline.registry import champions
from pipeline.registry.package import CHAMPION, Registry
from pipeline.serving.announce import announced
from pipeline.serving.app import create_app
from pipeline.serving.guard import LOOPBACK
from pipeline.serving.limits import Limits
from pipeline.serving.model import load_folder, load_version
from pipeline.serving.service import Service

TOKEN = "CRESCENDO_TOKEN"
LEAST_TOKEN = 16  # characters
CONNECTIONS = 1000
GRACE_SECONDS = 30  # for requests in progress, when it is to end


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 is any that is free."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    def listen(self) -> socket.socket:
        """A socket that listens here. Raises ConfigError for a host that is not this machine's, Busy for a port
        that is in use, AccessError for one that needs rights."""
        where = f"{self.host}:{self.port}"
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, self.port))
        except PermissionError as error:
            raise AccessError("E-ACC-002", where, "may not be used", "choose a --port above 1023") from error
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise Busy("E-BUSY-130", where, "is in use", "choose another --port") from error
            fix = "choose 127.0.0.1, or 0.0.0.0 for all"
            raise ConfigError("E-CFG-131", where, "is no address of this machine", fix) from error
        sock.listen(CONNECTIONS)  # from now on clients wait, and are not refused
        return sock


def environment_token() -> str | None:
    """The token that the environment has. Raises ConfigError for one that can be guessed."""
    token = os.environ.get(TOKEN)
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii()):
        problem = f"is not at least {LEAST_TOKEN} ASCII characters"
        raise ConfigError("E-CFG-132", TOKEN, problem, "make one with `openssl rand -hex 16`")
    return token


def token_for(address: Address, log: Callable[[str], None]) -> str | None:
    """The token that requests need: that of the environment, or beyond loopback one that is drawn and printed."""
    token = environment_token()
    if token is None and not address.is_loopback:
        token = secrets.token_urlsafe(24)
        log(f"token: {token} (set {TOKEN} to choose it)")
    return token


def registered_champion(root: Path) -> str:
    """The address of the project's champion."""
    return f"models:/{load_params(root / 'params.yaml').promotion.name}@{CHAMPION}"


def load_service(model: str, root: Path, device: str, limits: Limits, poll_seconds: float) -> Service:
    """The service of a folder, of a version, or of what an alias points to, which it follows."""
    if not model.startswith("models:"):
        return Service(load_folder(Path(locate(model, root)), device, root), limits)
    registry = Registry(root)
    service = Service(load_version(registry, champions.resolve(registry, model), device), limits)
    if "@" in model:
        service.follow(registry, model, device, poll_seconds)
    return service


def serve(
    service: Service,
    sock: socket.socket,
    host: str,
    token: str | None,
    runs: Path,
    log: Callable[[str], None],
) -> None:
    """Serve at a socket that listens, until SIGINT or SIGTERM, then finish what is in progress. `runs`: where
    `crescendo status` looks."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/"
    config = uvicorn.Config(
        create_app(service, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    with announced(runs, url):
        log(f"serving {service.model.label} at {url}")
        uvicorn.Server(config).run([sock])
