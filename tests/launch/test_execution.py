"""Workers under Ray: restarts, deaths and errors. The toy worker counts in a file."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.compute import ComputeProfile
from pipeline.errors import BadData, Busy, StorageError
from pipeline.launch import execution, failures
from tests.launch.toy import config_of, toy

TWO = ComputeProfile(workers=2, max_failures=1)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of this machine for all tests of this module, with an empty home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with execution.ray_session(2, inside_job=False):
            from ray import cloudpickle

            for name in (toy.__module__, __name__):
                cloudpickle.register_pickle_by_value(sys.modules[name])  # Workers cannot import a test.
            yield


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_continues_from_its_checkpoint(two_workers: None, tmp_path: Path) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    execution.train_under_ray("toy", partial(toy, kill=True), config_of(tmp_path / "run"), TWO)
    assert (tmp_path / "run/killed").read_text() == "3"
    assert (tmp_path / "run/result/starts").read_text() == "2 2"
    assert not (tmp_path / "run/ray").exists()
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ray would take Ctrl-C over.


@pytest.mark.ray
@pytest.mark.slow
def test_ray_asks_for_a_token_and_leaves_none_in_the_home_folder(two_workers: None) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not list(Path.home().iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_always_dies_ends_in_one_line(two_workers: None, tmp_path: Path) -> None:
    config, worker = config_of(tmp_path / "run"), partial(toy, kill=True)
    with pytest.raises(Busy, match="worker 1 died") as caught:
        execution.train_under_ray("toy", worker, config, ComputeProfile(workers=2, max_failures=0))
    assert "\n" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.slow
def test_a_pipeline_error_of_one_worker_surfaces_unchanged(two_workers: None, tmp_path: Path) -> None:
    execution.train_under_ray("toy", partial(toy, fail=True), config_of(tmp_path / "run"), TWO)
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
def test_tasks_are_mapped_and_their_errors_surface_unchanged(two_workers: None) -> None:
    assert sorted(execution.map_under_ray(square, [1, 2, 3])) == [1, 4, 9]
    with pytest.raises(StorageError, match="E-IO-999 toy: cannot square 5. Fix: take another number"):
        list(execution.map_under_ray(square, [5]))
