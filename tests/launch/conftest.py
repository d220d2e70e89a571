"""A repository with one stage."""

from pathlib import Path

import pytest

from pipeline import artifacts


@pytest.fixture()
def project(tmp_path: Path) -> Path:
    """A repository with one stage, whose dependency is named by a parameter."""
    (tmp_path / "params.yaml").write_text("seed: 1\ntoy: {init: data/in, lr: 1e-4}\nother: 2\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  toy:\n    cmd: x\n    deps: ['${toy.init}', code.py]\n    params: [seed, toy.lr]\n"
        "    outs: [out, {other: {cache: false}}]\n"
    )
    (tmp_path / "code.py").write_text("pass\n")
    with artifacts.commit_directory(tmp_path / "data/in") as folder:
        (folder / "x").write_text("1")
    return tmp_path
