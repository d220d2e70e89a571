"""The command line: which model is taken, what is refused, how quickly help comes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import cli
from pipeline.errors import ConfigError, InputMissing, StorageError

_spec = importlib.util.spec_from_file_location(
    "registry_fixtures", Path(__file__).parent / "registry/conftest.py"
)
assert _spec and _spec.loader
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)
quiet_store, root = fixtures.quiet_store, fixtures.root


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_without_a_registry_the_refined_model_is_taken(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "cat", "--num", "5", "--steps", "1", "--out", "sub/grid.png"]) == 0
    out, err = capfd.readouterr()
    assert "model: models/refined (nothing is registered)" in out and err == ""
    assert pixels("sub/grid.png").shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    assert not (root / "mlflow.db").exists()


def test_the_champion_comes_before_the_candidate_and_it_before_the_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fixtures.artifacts.directory_digest(root / "models/refined")
    fixtures.write_verdict(root, first, passed=False)
    cli.run(["promote", "--allow-candidate"])
    cli.run(["generate", "cat", "--num", "1"])
    assert "models:/crescendo@candidate, version 1" in capsys.readouterr().out
    fixtures.write_verdict(root, first)
    cli.run(["promote"])
    second = fixtures.write_model(root / "models/refined", seed=1)
    fixtures.write_verdict(root, second, passed=False)
    cli.run(["promote", "--allow-candidate"])
    cli.run(["generate", "cat", "--num", "1"])
    assert "models:/crescendo@champion, version 1" in capsys.readouterr().out
    cli.run(["generate", "cat", "--num", "1", "--model", "models:/crescendo/2"])
    assert second[:12] in capsys.readouterr().out


def test_a_picture_depends_on_its_prompt_and_seed_alone(root: Path) -> None:
    model = ["--model", "models/refined", "--steps", "2"]
    cli.run(["generate", "dog", "cat", "--num", "2", "--seed", "4", "--out", "both.png", *model])
    cli.run(["generate", "cat", "--num", "1", "--seed", "5", "--out", "one.png", *model])
    np.testing.assert_array_equal(pixels("both.png")[36:68, 36:68], pixels("one.png")[2:-2, 2:-2])
    assert (pixels("both.png")[2:34, 36:68] != pixels("one.png")[2:-2, 2:-2]).any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3"], "choose one of: 1, 2, 4"),
        (["--num", "0"], "--num"),
        (["--num", "5000"], "--num"),
        (["--seed", "-1"], "seed"),
        (["--out", "grid.gif"], ".png"),
        (["--guidance", "nan"], "--guidance"),
    ],
)
def test_values_that_cannot_be_are_refused(root: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.run(["generate", "cat", *more])
    assert not list(root.glob("grid.*"))


def test_a_model_of_another_text_encoder_is_refused(root: Path) -> None:
    fixtures.write_model(root / "other", encoder="0" * 64)
    with pytest.raises(StorageError, match="trained with text encoder 000000000000"):
        cli.run(["generate", "cat", "--model", "other"])


def test_a_teacher_is_sampled_in_steps_with_guidance(root: Path) -> None:
    fixtures.write_model(root / "teacher", kind="finetuned")
    run = ["generate", "cat", "--num", "1", "--model", "teacher", "--steps", "3"]
    cli.run([*run, "--out", "a.png"])
    cli.run([*run, "--guidance", "4", "--out", "b.png"])
    assert (pixels("a.png") != pixels("b.png")).any()


def test_guidance_without_effect_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["generate", "cat", "--num", "1", "--guidance", "2"])
    assert "no effect" in capsys.readouterr().err


def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(InputMissing, match="nowhere"):
        cli.run(["generate", "cat", "--model", "nowhere"])


def test_errors_are_one_line_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "promote"]
    source = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": source}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 66 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("E-INP-001")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from pipeline import cli\ntry: cli.run(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'mlflow', 'pydantic', 'numpy', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
