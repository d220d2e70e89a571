"""Failures that travel from a worker to the driver."""

from pathlib import Path

import pytest

from pipeline.launch import failures
from pipeline.launch.worker import WorkerConfig
from tests.launch.toy import config_of


def test_a_bug_in_a_worker_is_shown_with_its_traceback(tmp_path: Path) -> None:
    empty: dict[str, None] = {}
    with pytest.raises(KeyError):
        failures.record_failure(lambda config: empty["nothing"], config_of(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        failures.raise_failure(tmp_path / "run")


def test_what_a_restart_may_cure_leaves_no_record_and_a_record_ends_the_restart(tmp_path: Path) -> None:
    def lost(config: WorkerConfig) -> None:
        raise RuntimeError("connection closed by peer")

    config = config_of(tmp_path / "run")
    with pytest.raises(RuntimeError, match="closed by peer"):
        failures.record_failure(lost, config)
    failures.raise_failure(tmp_path / "run")
    (tmp_path / "run/failure.json").write_text("{}")
    failures.record_failure(lost, config)
