"""A Ray cluster of some nodes on this machine, for tests and campaigns."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.launch.session import PRIVATE_ENV, RAY_ENV

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
START = (
    "ray start --block --object-store-memory=80000000 --disable-usage-stats --temp-dir={folder} "
    "--dashboard-agent-listen-port={port}"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """Dashboard URL of a cluster that asks for this environment's token. Drivers run on its head, all work on the
    other node, which does not see the head's folder, where the packages of drivers are."""
    with (
        ray_head() as (home, url, address),
        ray_node(home / "node", worker(address, 2), without(home / "head")),
    ):
        yield url


@contextlib.contextmanager
def ray_head() -> Iterator[tuple[Path, str, str]]:
    """A head that computes nothing: a folder for its nodes, the URL of its dashboard, and the address for nodes."""
    url, gcs = f"http://127.0.0.1:{(port := free_port())}", free_port()
    head = f"--head --num-cpus=0 --port={gcs} --dashboard-port={port} --ray-client-server-port={free_port()}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        with ray_node(home / "head", head) as process:
            await_refusal(url, process, home / "head/out")
            yield home, url, f"127.0.0.1:{gcs}"


def worker(address: str, cores: int) -> str:
    """Arguments of `ray start` for a node that computes."""
    return f"--address={address} --num-cpus={cores}"


def without(hidden: Path) -> list[str]:
    """What runs a command that sees a folder empty; nothing where Linux does not allow that."""
    start = ["unshare", "-mr", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh"]
    allowed = shutil.which("unshare") and not subprocess.run([*start, "true"], capture_output=True).returncode
    return start if allowed else []


@contextlib.contextmanager
def ray_node(folder: Path, arguments: str, start: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `ray start` for the block; its files, and what it prints, are in `folder`."""
    folder.mkdir()
    others = ("CRESCENDO_", "MLFLOW_")  # of other tests in this process
    names = (name for name in os.environ.keys() - PRIVATE_ENV.keys() if not name.startswith(others))
    kept = {name: os.environ[name] for name in names}
    command = START.format(folder=folder, port=free_port())
    with open(folder / "out", "w") as out:
        node = subprocess.Popen(
            [*start, *command.split(), *arguments.split()],
            env={**kept, **RAY_ENV, "PATH": PATH},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield node
    finally:
        node.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)  # An agent of Ray's may hang.


def await_refusal(url: str, head: subprocess.Popen[bytes], printed: Path) -> None:
    """Wait for a head that refuses whoever shows no token."""
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
            raise AssertionError("the cluster asks for no token")
        except urllib.error.HTTPError as refusal:
            if refusal.code in (401, 403):
                return
        except OSError:
            assert head.poll() is None, printed.read_text()
            time.sleep(0.5)
    raise AssertionError(printed.read_text())
