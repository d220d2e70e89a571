"""The model that a command uses: the champion, the candidate or a folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.cli import main
from pipeline.errors import InputMissing, StorageError
from tests.registry.conftest import write_model, write_verdict


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_without_a_registry_the_refined_model_is_taken(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "cat", "--num", "5", "--steps", "1", "--out", "sub/grid.png"]) == 0
    out, err = capfd.readouterr()
    assert "model: models/refined (nothing is registered)" in out and err == ""
    assert pixels("sub/grid.png").shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    assert not (root / "mlflow.db").exists()


@pytest.mark.slow
def test_the_champion_comes_before_the_candidate_and_it_before_the_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = artifacts.directory_digest(root / "models/refined")
    write_verdict(root, first, "failed")
    main.run(["promote", "--allow-candidate"])
    main.run(["generate", "cat", "--num", "1"])
    assert "models:/crescendo@candidate, version 1" in capsys.readouterr().out
    write_verdict(root, first)
    main.run(["promote"])
    second = write_model(root / "models/refined", seed=1)
    write_verdict(root, second, "undecided")
    main.run(["promote", "--allow-candidate"])
    main.run(["generate", "cat", "--num", "1"])
    assert "models:/crescendo@champion, version 2" in capsys.readouterr().out
    main.run(["generate", "cat", "--num", "1", "--model", "models:/crescendo/3"])
    assert second[:12] in capsys.readouterr().out


def test_a_model_of_another_text_encoder_is_refused(root: Path) -> None:
    write_model(root / "other", encoder="0" * 64)
    with pytest.raises(StorageError, match="trained with text encoder 000000000000"):
        main.run(["generate", "cat", "--model", "other"])


def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(InputMissing, match="nowhere"):
        main.run(["generate", "cat", "--model", "nowhere"])
