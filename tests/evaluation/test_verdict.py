"""The verdict's file: written and read back equal, and refused where it is incomplete or contradicts itself."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import BadData, InputMissing
from pipeline.evaluation.verdict import (
    Baseline,
    PassVerdict,
    Rule,
    Verdict,
    combine,
    fewest_passed,
)


def pass_verdict(passes: int, *outcomes: str) -> PassVerdict:
    rules = tuple(
        Rule(f"rule_{i}", outcome, 0.5, 0.4, 0.6, 0.9, reason=f"{outcome} it is")
        for i, outcome in enumerate(outcomes)
    )
    return PassVerdict(passes, passes, combine(outcomes), rules)


def verdict(*verdicts: PassVerdict) -> Verdict:
    baseline = Baseline("models/finetuned", "b" * 64)
    return Verdict("d" * 64, "e" * 64, "f" * 64, baseline, True, verdicts, fewest_passed(verdicts))


WHOLE = verdict(pass_verdict(1, "passed", "failed"), pass_verdict(2, "passed", "passed"))


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(BadData) as caught:
        Verdict.read(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and line.endswith("Fix: run `dvc repro evaluate`")
    return line


def test_a_verdict_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text(json.dumps(WHOLE.to_json()))
    assert Verdict.read(tmp_path / "verdict.json") == WHOLE


def test_what_training_adds_is_written_beside_the_interval() -> None:
    rule = Rule("recall", "failed", 0.5, 0.4, 0.6, 0.9, reason="worse", training=0.05)
    assert str(rule) == "recall 0.5 [0.4, 0.6] \u00b1 0.05 over seeds of training (threshold 0.9): worse"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["passed", "passed"], "passed"),
        (["passed", "undecided"], "undecided"),
        (["undecided", "failed"], "failed"),
    ],
)
def test_a_failed_rule_outweighs_an_undecided_one_and_it_a_passed_one(
    outcomes: list[str], expected: str
) -> None:
    assert pass_verdict(1, *outcomes).outcome == expected


@pytest.mark.parametrize(
    ("by_passes", "default", "outcome"),
    [
        ({4: "passed", 2: "passed", 1: "failed"}, 2, "passed"),
        ({1: "undecided", 2: "failed"}, None, "undecided"),
        ({1: "failed", 2: "failed"}, None, "failed"),
    ],
)
def test_the_default_is_the_fewest_passes_that_passed(
    by_passes: dict[int, str], default: int | None, outcome: str
) -> None:
    whole = verdict(*(pass_verdict(passes, outcome) for passes, outcome in by_passes.items()))
    assert (whole.default_passes, whole.outcome) == (default, outcome)


def test_what_stands_in_the_way_are_the_failed_rules_else_the_undecided_ones() -> None:
    rules = (
        Rule("kid", "undecided", reason="undecided: 23 families, about 60 needed"),
        Rule("finite", "passed"),
    )
    undecided = PassVerdict(2, 2, "undecided", rules)
    whole = verdict(pass_verdict(1, "passed", "undecided", "failed"), undecided, pass_verdict(4, "passed"))
    assert str(whole) == (
        "1 pass failed (rule_2 0.5 [0.4, 0.6] (threshold 0.9): failed it is); "
        "2 passes undecided (kid: 23 families, about 60 needed); 4 passes passed"
    )


def test_a_model_that_is_not_refined_is_judged_in_calls() -> None:
    whole = replace(verdict(pass_verdict(12, "passed")), is_refined=False)
    assert str(whole) == "the fine-tuned model in 12 calls passed"
    in_its_place = replace(whole, refused=(pass_verdict(1, "failed"),))
    assert str(in_its_place).startswith("1 pass failed (rule_0")
    assert str(in_its_place).endswith("; the fine-tuned model in 12 calls passed")


def test_the_fine_tuned_model_takes_no_place_that_the_refined_one_may_have() -> None:
    whole = replace(verdict(pass_verdict(12, "passed")), is_refined=False)
    with pytest.raises(ValidationError, match="the refined model passed"):
        replace(whole, refused=(pass_verdict(1, "passed"),))
    with pytest.raises(ValidationError, match="stands in for itself"):
        replace(whole, is_refined=True, refused=(pass_verdict(1, "failed"),))


def test_a_verdict_that_contradicts_itself_cannot_be_made() -> None:
    with pytest.raises(ValidationError, match="does not follow"):
        PassVerdict(1, 1, "passed", (Rule("kid", "failed"),))
    with pytest.raises(ValidationError, match="finite"):
        Rule("kid", "passed", float("nan"))


def test_a_missing_verdict_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"E-INP-041 .*verdict\.json: is missing"):
        Verdict.read(tmp_path / "verdict.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass").decode("latin-1")]
)
def test_text_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    assert "is not JSON" in refusal(tmp_path / "verdict.json", text)


def test_the_format_of_earlier_versions_is_named(tmp_path: Path) -> None:
    old = {"passed": True, "model_digest": "e" * 64, "data_digest": "d" * 64, "rules": []}
    assert "format of an earlier version" in refusal(tmp_path / "verdict.json", json.dumps(old))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("extra", 1, "is not a verdict: extra"),
        ("default_passes", ..., "is not a verdict: default_passes: field required"),
        ("baseline.model_digest", "b", "is not a verdict: baseline.model_digest"),
        ("baseline", None, "is not a verdict: baseline"),
        ("is_refined", 1, "is not a verdict: is_refined"),
        ("evidence_digest", None, "is not a verdict: evidence_digest"),
        ("verdicts", [], "is not a verdict: verdicts"),
        ("verdicts.0.nfe", 1.5, "is not a verdict: verdicts.0.nfe"),
        ("verdicts.0.nfe", True, "is not a verdict: verdicts.0.nfe"),
        ("verdicts.0.passes", 0, "is not a verdict: verdicts.0.passes"),
        ("verdicts.0.passes", 2, "contradicts itself: a number of passes is given twice"),
        ("verdicts.0.outcome", "maybe", "is not a verdict: verdicts.0.outcome"),
        ("verdicts.0.outcome", "passed", "contradicts itself: verdicts.0: outcome 'passed' does not follow"),
        ("verdicts.0.rules", [], "is not a verdict: verdicts.0.rules"),
        ("verdicts.0.rules.0.note", "", "is not a verdict: verdicts.0.rules.0.note"),
        ("verdicts.0.rules.0.value", "0.5", "is not a verdict: verdicts.0.rules.0.value"),
        ("verdicts.0.rules.0.value", True, "is not a verdict: verdicts.0.rules.0.value"),
        ("verdicts.0.rules.0.value", float("nan"), "is not a verdict: verdicts.0.rules.0.value"),
        ("verdicts.0.rules.0.high", float("inf"), "is not a verdict: verdicts.0.rules.0.high"),
        ("verdicts.0.rules.0.families", 2.5, "is not a verdict: verdicts.0.rules.0.families"),
        ("verdicts.0.rules.0.name", "rule_1", "contradicts itself: verdicts.0: a rule is given twice"),
        ("default_passes", 1, "contradicts itself: default_passes 1 does not follow"),
        ("default_passes", None, "contradicts itself: default_passes None does not follow"),
    ],
)
def test_what_is_missing_unknown_or_contradictory_is_named(
    tmp_path: Path, path: str, value: Any, words: str
) -> None:
    tree: Any = json.loads(json.dumps(copy.deepcopy(WHOLE.to_json())))
    *parents, last = path.split(".")
    inner = tree
    for name in parents:
        inner = inner[int(name)] if name.isdecimal() else inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    assert words in refusal(tmp_path / "verdict.json", json.dumps(tree))


def test_reading_a_verdict_needs_no_torch() -> None:
    code = "import sys, pipeline.evaluation.verdict; print({'torch', 'numpy', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
