"""Signals to a training stage: the first one asks it to stop, the second one stops it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch.stopping import SIGNALS, stop_with_checkpoint


class Interrupted(Exception):
    """What the handlers raise that were there before."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_stops(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted), stop_with_checkpoint("pretrain", tmp_path):
        os.kill(os.getpid(), number)
        assert (tmp_path / "stop").exists()
        os.kill(os.getpid(), signal.SIGTERM)
    assert not (tmp_path / "stop").exists()
    assert capfd.readouterr().err == (
        "pretrain: stopping at the next record of progress, with a checkpoint; once more stops at once\n"
    )


def test_what_is_ignored_stays_so_and_handlers_come_back(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with stop_with_checkpoint("pretrain", tmp_path):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not (tmp_path / "stop").exists()
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
