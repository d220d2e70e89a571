"""Registries to attack: a SQLite file, and an MLflow server over a PostgreSQL cluster of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.chaos import forks
from benchmarks.chaos.project import make_project, params_of, required_by, trusted
from pipeline.errors import Busy, InputMissing
from pipeline.processes import signal_on_parent_death
from pipeline.registry.promote import promote
from pipeline.tracking import store

SQLITE, POSTGRES = "sqlite", "postgresql"
DEBIAN = Path("/usr/lib/postgresql")  # where Debian's packages put the server's programs
PATIENCE = 180.0  # seconds, for a server to answer
ACCOUNT = "postgres"  # as whom the cluster runs if this is root, which PostgreSQL refuses


@dataclass(frozen=True)
class Store:
    """A registry: its kind, its tracking URI, the folder of its models' files, and the address of its database; the
    last two None of one on another machine."""

    kind: str
    uri: str
    models: Path | None
    database: str | None

    @property
    def environment(self) -> dict[str, str]:
        """What leads a process to it."""
        return {"MLFLOW_TRACKING_URI": self.uri}


def new_sqlite(folder: Path, template: Path) -> Store:
    """A store in `folder`, copied from an empty one in `template`, since MLflow takes seconds to create one."""
    folder.mkdir(parents=True)
    shutil.copyfile(template / store.STORE, folder / store.STORE)
    uri = f"sqlite:///{folder / store.STORE}"
    return Store(SQLITE, uri, folder / "mlartifacts" / "models", uri)


def rehearse(folder: Path) -> Path:
    """Promote a model once, also to import in this process what that imports; the folder of an empty store, a
    template for others. All of it is made anew in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    template, project = folder / "empty", folder / "project"
    template.mkdir(parents=True)
    make_project(project, seed=0)

    def promoted() -> None:
        store.connect(template)
        new_sqlite(folder / "store", template)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'store' / store.STORE}"
        with trusted():
            promote(project, params_of(project))

    uri = f"sqlite:///{template / store.STORE}"
    forks.warm_up(promoted, folder / "log", {"MLFLOW_TRACKING_URI": uri})
    required_by("minilm")
    return template


def reached(uri: str) -> Store:
    """The server that the user named."""
    return Store(f"server {store.public_uri(uri)}", uri, None, None)


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[Store]:
    """An MLflow server on this machine over a PostgreSQL cluster in `folder`, for the block.

    Raises InputMissing where PostgreSQL, or an account to run it, is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = folder / "artifacts"
    with _cluster(folder) as database, open(folder / "server.log", "ab") as log:
        port = _free_port()
        options = {
            "backend-store-uri": database,
            "artifacts-destination": str(artifacts),
            "host": "127.0.0.1",
            "port": str(port),
            "workers": "1",
        }
        command = [sys.executable, "-m", "mlflow", "server"]
        command += [f"--{name}={value}" for name, value in options.items()]
        off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **off}
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=partial(signal_on_parent_death, signal.SIGTERM),
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
            models = artifacts / "1" / "models"
            yield Store(POSTGRES, f"http://127.0.0.1:{port}", models, database)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[str]:
    """A PostgreSQL cluster that answers on a socket in `folder`; the address of its database."""
    programs, user = _programs(), _account()
    place, database = folder / "cluster", folder / "socket"
    for each in (place, database):
        each.mkdir(exist_ok=True)
        if user is not None:
            shutil.chown(each, user)
    with open(folder / "postgres.log", "ab") as log:
        if not (place / "PG_VERSION").exists():
            command = [
                programs / "initdb",
                "-D",
                place,
                "-U",
                "mlflow",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-sync",
            ]
            subprocess.run(command, check=True, stdout=log, stderr=log, user=user, cwd="/")
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={database}"]
        command = [programs / "postgres", "-D", place, *options]
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            user=user,
            cwd="/",
            preexec_fn=partial(signal_on_parent_death, signal.SIGINT),
        )
        try:
            _wait_for_socket(database / ".s.PGSQL.5432", server, folder / "postgres.log")
            yield f"postgresql://mlflow@/postgres?host={database}"
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown
            server.wait()


def _programs() -> Path:
    """The folder of PostgreSQL's server programs."""
    found = shutil.which("initdb")
    places = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found is None and not places:
        fix = "install it (Debian: `apt-get install postgresql`), or name a server with --server"
        raise InputMissing(
            "E-INP-043", "PostgreSQL", "initdb is neither on the path nor in " + str(DEBIAN), fix
        )
    return Path(found).resolve().parent if found else places[-1].parent


def _account() -> str | None:
    """As whom to run PostgreSQL: None is this user."""
    import pwd

    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(ACCOUNT).pw_name
    except KeyError:
        fix = f"run this as another user, or add an account `{ACCOUNT}`"
        raise InputMissing("E-INP-044", "PostgreSQL", "it does not run as root", fix) from None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return True
        return False

    _patiently(answers, server, log)


def _wait_for_socket(place: Path, server: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as tried:
            tried.connect(str(place))
            return True
        return False

    _patiently(answers, server, log)


def _patiently(answers: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers. Raises Busy where it does not."""
    deadline = time.monotonic() + PATIENCE
    while not answers():
        if server.poll() is not None or time.monotonic() > deadline:
            raise Busy("E-BUSY-045", str(log.parent), "a server does not start", f"read {log}")
        time.sleep(0.1)
