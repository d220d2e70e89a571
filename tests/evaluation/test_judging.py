"""A verdict is computed again from its evidence, and one that was written by hand is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import artifacts
from pipeline.config.params import Params, load_params
from pipeline.errors import BadData, InputMissing
from pipeline.evaluation.estimates import estimates_of
from pipeline.evaluation.evidence import Evidence, Subject
from pipeline.evaluation.judging import build_verdict, recompute
from pipeline.evaluation.verdict import Verdict
from tests.evaluation.evidence import evidence, images

ROOT = Path(__file__).parents[2]
SUBJECT = Subject("d" * 64, {"refined": "a" * 64, "finetuned": "c" * 64}, "models/finetuned", 12)


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """evidence.safetensors of a model with blurred images, and its verdict, which fails."""
    folder = tmp_path_factory.mktemp("judged")
    blurred = replace(images(np.random.default_rng(3), 60), power=np.full(60, 50.0))
    path = folder / "evidence.safetensors"
    evidence(30, candidate={"train": blurred}, nfe={"refined_1": 2, "finetuned": 24}, subject=SUBJECT).save(
        path
    )
    verdict = build_verdict(estimates_of(Evidence.load(path)), artifacts.sha256_file(path), params)
    (folder / "verdict.json").write_text(json.dumps(verdict.to_json()))
    return folder


def check(folder: Path, params: Params) -> Verdict:
    claimed = Verdict.read(folder / "verdict.json")
    return recompute(claimed, folder / "verdict.json", folder / "evidence.safetensors", params)


def test_the_verdict_of_an_untouched_evaluation_is_found_again(judged: Path, params: Params) -> None:
    assert check(judged, params) == Verdict.read(judged / "verdict.json")


def _pass(tree: dict[str, Any]) -> None:
    (verdict,) = tree["verdicts"]
    for rule in verdict["rules"]:
        rule["outcome"] = "passed"
    verdict["outcome"], tree["default_passes"] = "passed", 1


def _move(tree: dict[str, Any]) -> None:
    rule = next(rule for rule in tree["verdicts"][0]["rules"] if rule["name"] == "sharpness")
    rule["value"] = 0.01


TAMPERED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_pass, "default_passes is 1, recomputed None|outcome is passed, recomputed (failed|undecided)"),
    (_move, r"verdicts.0.rules.\d+.value is 0.01, recomputed 0.[1-9]"),
    (lambda tree: tree.update(data_digest="0" * 64), "data_digest is 000000000000, recomputed dddddddddddd"),
    (
        lambda tree: tree.update(model_digest="0" * 64),
        "model_digest is 000000000000, recomputed aaaaaaaaaaaa",
    ),
    (lambda tree: tree["baseline"].update(model_digest="0" * 64), "baseline.model_digest is 000000000000"),
    (lambda tree: tree["baseline"].update(address="models:/x/1"), "baseline.address is models:/x/1"),
    (lambda tree: tree.update(evidence_digest="0" * 64), "names evidence 000000000000"),
]


@pytest.mark.parametrize(("change", "words"), TAMPERED)
def test_an_edited_verdict_is_refused(
    judged: Path, params: Params, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    shutil.copytree(judged, tmp_path, dirs_exist_ok=True)
    tree = json.loads((judged / "verdict.json").read_text())
    change(tree)
    (tmp_path / "verdict.json").write_text(json.dumps(tree))
    with pytest.raises(BadData, match=words) as error:
        check(tmp_path, params)
    assert str(error.value).endswith("run `dvc repro evaluate`") and len(str(error.value).splitlines()) == 1


def test_other_thresholds_and_missing_or_older_evidence_are_refused(
    judged: Path, params: Params, tmp_path: Path
) -> None:
    promotion = params.promotion.model_copy(update={"sharpness_margin": 9.0})
    with pytest.raises(BadData, match="does not follow from"):
        check(judged, params.model_copy(update={"promotion": promotion}))
    claimed, path = Verdict.read(judged / "verdict.json"), tmp_path / "evidence.safetensors"
    with pytest.raises(InputMissing, match="E-INP-070"):
        recompute(claimed, tmp_path / "verdict.json", path, params)
    evidence(12).save(path)
    older = replace(claimed, evidence_digest=artifacts.sha256_file(path))
    with pytest.raises(BadData, match="does not say which models it is of"):
        recompute(older, tmp_path / "verdict.json", path, params)
