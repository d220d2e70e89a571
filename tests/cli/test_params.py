"""`crescendo preset`: values of a file into params.yaml."""

import shutil
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config.params import load_params
from pipeline.errors import ConfigError
from pipeline.presets import apply_preset, presets
from tests.conftest import ROOT


def test_a_preset_changes_its_values_and_keeps_the_comments(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "presets", root / "presets")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    assert main.run(["preset"]) == 0
    assert f"cifar10-128  {presets(ROOT)['cifar10-128']}" in capsys.readouterr().out
    assert main.run(["preset", "cifar10-128"]) == 0
    assert "data.source: openmoji==17.0.0 -> torchvision:CIFAR10" in capsys.readouterr().out
    params = load_params(root / "params.yaml")
    assert (params.data.source, params.data.resolution, params.data.subset) == (
        "torchvision:CIFAR10",
        128,
        (),
    )
    kept = [line.partition("#")[2] for line in (root / "params.yaml").read_text().splitlines() if "#" in line]
    assert kept == [
        line.partition("#")[2] for line in (ROOT / "params.yaml").read_text().splitlines() if "#" in line
    ]
    with pytest.raises(ConfigError, match="there is no preset 'tiny'.*choose one of: .*cifar10-128"):
        main.run(["preset", "tiny"])


def test_a_preset_that_would_not_be_valid_changes_nothing(root: Path) -> None:
    (root / "presets").mkdir()
    (root / "presets/bad.yaml").write_text("# A bad one\ndata: {resolution: 100}\n")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    with pytest.raises(ConfigError, match="100 is not a power of two"):
        main.run(["preset", "bad"])
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
def test_every_preset_is_valid(preset: str, root: Path) -> None:
    shutil.copytree(ROOT / "presets", root / "presets")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    assert apply_preset(root, preset)
    assert apply_preset(root, preset) == [], "nothing is left to change"
