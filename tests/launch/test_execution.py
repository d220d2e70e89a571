"""Workers under Ray: restarts, deaths and errors. The toy worker counts in a file."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.compute import ComputeProfile
from pipeline.errors import BadData, Busy, StorageError
from pipeline.launch import execution, failures
from pipeline.launch.session import DAEMONS, LOGS, RayDied, Session, ray_session
from pipeline.launch.worker import WorkerConfig
from pipeline.processes import users_of
from pipeline.training.records import NOTICES, read_records
from tests.conftest import ROOT
from tests.launch.toy import config_of, toy

TWO = ComputeProfile(workers=2, max_failures=1)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A Ray of this machine for all tests of this module, with an empty home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with ray_session(2, tmp_path_factory.mktemp("ray")) as session:
            from ray import cloudpickle

            for name in (toy.__module__, __name__):
                cloudpickle.register_pickle_by_value(sys.modules[name])  # Workers cannot import a test.
            yield session


def listening(pid: int) -> set[str]:
    """IP addresses, as the hexadecimal digits of /proc/net, at which a process listens."""
    opened, addresses = set(), set()
    with contextlib.suppress(FileNotFoundError):  # it has ended
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                opened.add(os.readlink(file))
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in opened:
                    addresses.add(fields[1].partition(":")[0])
    return addresses


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as an IPv6 address


def programs_of_ray() -> Iterator[str]:
    """Names that Ray gives the processes of its raylet, of which this is one: `ray::RayTrainWorker.run`."""
    for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(FileNotFoundError):  # it has ended
                yield Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].strip()


def watched_toy(config: WorkerConfig) -> None:
    """Die once, as `toy` does, and write down at which addresses the worker listens, and which helpers Ray runs."""
    (config.run_dir / f"listening-{os.getpid()}").write_text(" ".join(listening(os.getpid())))
    (config.run_dir / f"programs-{os.getpid()}").write_text("\n".join(programs_of_ray()))
    toy(config, kill=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_continues_from_its_checkpoint(two_workers: Session, tmp_path: Path) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    execution.train_under_ray(two_workers, "toy", watched_toy, config_of(tmp_path / "run"), TWO)
    seen = [set(path.read_text().split()) for path in (tmp_path / "run").glob("listening-*")]
    assert len(seen) == 4 and set().union(*seen) <= LOOPBACK, "workers meet where no other machine comes"
    programs = "\n".join(path.read_text() for path in (tmp_path / "run").glob("programs-*"))
    assert "ray::RayTrainWorker" in programs
    for unneeded in ("PlacementGroupCleaner", "DatasetManager", "PreemptionWatcher"):
        assert unneeded not in programs
    assert (tmp_path / "run/killed").read_text() == "3"
    assert (tmp_path / "run/result/starts").read_text() == "2 2"
    assert not (tmp_path / "run/ray").exists()
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ray would take Ctrl-C over.


@pytest.mark.ray
@pytest.mark.slow
def test_ray_asks_for_a_token_and_leaves_none_in_the_home_folder(two_workers: Session) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not list(Path.home().iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_no_other_machine_can_reach_a_server_of_ray(two_workers: Session) -> None:
    import ray

    folder = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[2]
    addresses = set().union(*(listening(pid) for pid in (os.getpid(), *users_of(folder))))
    assert addresses and addresses <= LOOPBACK


DEADLY = """
import os, signal, sys, time
from pathlib import Path
from pipeline.compute import ComputeProfile
from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.execution import execute
from pipeline.launch.worker import WorkerConfig

def kill_the_raylet(config):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)

def main():
    run_dir = Path("run").resolve()
    run_dir.mkdir()
    config = WorkerConfig(load_params(Path(sys.argv[1])), run_dir, run_dir)
    execute("toy", kill_the_raylet, config, ComputeProfile(workers=1))

if __name__ == "__main__":
    run_main(main)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_daemon_of_ray_is_one_line_and_may_be_continued(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    done = subprocess.run(
        [sys.executable, "deadly.py", str(ROOT / "params.yaml")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (75, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert "raylet died" in line and "run the same command again" in line
    assert (tmp_path / "run" / LOGS / "raylet.out").is_file()


def test_fewer_workers_are_told_and_so_are_as_many_as_before(tmp_path: Path) -> None:
    for size, idle in ((2, ""), (1, "; 2 more cannot share 4 shards"), (1, ""), (2, ""), (2, "")):
        execution._tell(tmp_path, size, 2, idle)
    said = [record["text"] for record in read_records(tmp_path / NOTICES)]
    assert said == [
        "1 of 2 workers train; 2 more cannot share 4 shards",
        "1 of 2 workers train",
        "2 of 2 workers train",
    ]


def test_as_many_of_an_elastic_profile_train_as_can_share_the_shards() -> None:
    from pipeline.launch.meeting import computing

    assert [computing(4, workers) for workers in (1, 2, 3, 4, 5)] == [1, 2, 2, 4, 4]
    assert [computing(6, workers) for workers in (4, 5, 6)] == [3, 3, 6]


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThe raylet failed.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RayDied, match="E-BUSY-034 Ray: did not start: The current") as caught:
        with ray_session(1, tmp_path):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DAEMONS)
def test_the_death_of_a_daemon_ends_what_waits_for_it(name: str, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as daemon:
        session = Session(tmp_path, {os.pidfd_open(daemon.pid): name})
        assert session.run(lambda: 1) == 1
        threading.Timer(0.1, daemon.kill).start()
        with pytest.raises(RayDied, match=f"E-BUSY-033 .*{name} died"):
            session.run(threading.Event().wait)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_always_dies_ends_in_one_line(two_workers: Session, tmp_path: Path) -> None:
    config, worker = config_of(tmp_path / "run"), partial(toy, kill=True)
    with pytest.raises(Busy, match="worker 1 died") as caught:
        execution.train_under_ray(
            two_workers, "toy", worker, config, ComputeProfile(workers=2, max_failures=0)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.slow
def test_a_pipeline_error_of_one_worker_surfaces_unchanged(two_workers: Session, tmp_path: Path) -> None:
    execution.train_under_ray(two_workers, "toy", partial(toy, fail=True), config_of(tmp_path / "run"), TWO)
    with pytest.raises(BadData) as caught:
        failures.raise_failure(tmp_path / "run")
    assert str(caught.value) == "E-DAT-999 toy: has a bad\\nimage. Fix: remove it"
    assert not (tmp_path / "run/failure.json").exists()


@contextlib.contextmanager
def square() -> Iterator[Callable[[int], int]]:
    """Squares numbers; cannot square 5."""

    def work(number: int) -> int:
        if number == 5:
            raise StorageError("E-IO-999", "toy", "cannot square 5", "take another number")
        return number * number

    yield work


@pytest.mark.ray
@pytest.mark.slow
def test_tasks_are_mapped_and_their_errors_surface_unchanged(two_workers: Session) -> None:
    assert sorted(execution.map_under_ray(two_workers, square, [1, 2, 3])) == [1, 4, 9]
    with pytest.raises(StorageError, match="E-IO-999 toy: cannot square 5. Fix: take another number"):
        list(execution.map_under_ray(two_workers, square, [5]))
