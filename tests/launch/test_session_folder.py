"""Folders of private Rays: those of dead drivers are removed, and no others."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch.session_folder import PREFIX, session_folder, sweep

DRIVER = """
import sys, time
from pipeline.launch.session_folder import session_folder
with session_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_driver_left_is_removed_with_those_that_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / f"{PREFIX}unknown").mkdir()  # not of a driver, or not yet
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        left = Path(driver.stdout.readline().strip())
        assert sweep(tmp_path) == 0
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    with open(left / "log", "w") as log:
        agent = subprocess.Popen(["sleep", "60"], stdout=log)
    with session_folder() as own, open(own / "log", "w") as log:
        assert agent.wait(5) == -signal.SIGKILL and not left.exists()
        assert own.parent == tmp_path
        agent = subprocess.Popen(["sleep", "60"], stdout=log)
    assert agent.wait(5) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}unknown"]
    assert capsys.readouterr().err.endswith(f"left in {tmp_path}: {PREFIX}* (1)\n")
