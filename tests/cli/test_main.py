"""The console script: one line for an error, and quick help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.conftest import ROOT


def test_errors_are_one_line_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "promote"]
    source = str(ROOT)
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": source}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 66 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("E-INP-001")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli import main\n"
        "try: main.run(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(set(sys.modules) - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {name.partition(".")[0] for name in ast.literal_eval(done.stdout.splitlines()[-1])}
    assert names - set(sys.stdlib_module_names) == {"__main__", "pipeline"}


def test_a_status_needs_no_torch() -> None:
    code = "import sys, pipeline.overview.project; print('torch' in sys.modules, 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize(
    "command", ["data check", "data show", "preset", "pin", "promote", "generate", "upscale"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.run([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: crescendo {command}" in capsys.readouterr().out
