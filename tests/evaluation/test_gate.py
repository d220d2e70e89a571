"""Every rule of the gate passes and fails where it should."""

import dataclasses
import math

import pytest

from pipeline.evaluation import gate
from pipeline.evaluation.metrics import Metric

THRESHOLDS = gate.Thresholds(kid_margin=0.0, max_copies=0.01, min_recall=0.95, min_coverage=0.95)
GOOD = {
    "candidate": {
        "recall": Metric(0.80, 90),
        "coverage": Metric(0.90, 90),
        "copies": Metric(0.0, 360),
        "top_octave": Metric(-0.05, 90),
    },
    "baseline": {
        "recall": Metric(0.82, 90),
        "coverage": Metric(0.88, 90),
        "copies": Metric(0.0, 90),
        "top_octave": Metric(-0.4, 90),
    },
    "kid_difference": Metric(-0.01, 90, -0.03, 0.01),
    "kid_floor": Metric(0.0, 90, -0.02, 0.02),
    "sharpness_floor": Metric(0.1, 90),
    "finite": True,
}


def rules(thresholds: gate.Thresholds = THRESHOLDS, **changes: object) -> dict[str, gate.Rule]:
    """The rules by name; `candidate__recall=...` changes one metric of the good case."""
    arguments = {key: dict(value) if isinstance(value, dict) else value for key, value in GOOD.items()}
    for key, value in changes.items():
        side, _, name = key.partition("__")
        if name:
            arguments[side][name] = value  # type: ignore[index]
        else:
            arguments[side] = value
    return {rule.name: rule for rule in gate.decide(**arguments, thresholds=thresholds)}  # type: ignore[arg-type]


def test_a_model_that_meets_every_rule_passes() -> None:
    verdict = gate.verdict(list(rules().values()), "model", "data")
    assert verdict["passed"] is True
    assert {rule["name"] for rule in verdict["rules"]} == {
        "kid_difference",
        "recall",
        "coverage",
        "copies",
        "sharpness",
        "finite",
    }
    assert (verdict["model_digest"], verdict["data_digest"]) == ("model", "data")
    assert set(verdict["rules"][0]) == {"name", "passed", "value", "threshold", "reason"}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"kid_difference": Metric(0.0, 90, -0.02, 0.021)}, "kid_difference"),
        ({"candidate__recall": Metric(0.77, 90)}, "recall"),
        ({"candidate__coverage": Metric(0.83, 90)}, "coverage"),
        ({"candidate__copies": Metric(0.02, 360)}, "copies"),
        ({"candidate__top_octave": Metric(0.41, 90)}, "sharpness"),
        ({"candidate__top_octave": Metric(-0.41, 90)}, "sharpness"),
        ({"finite": False}, "finite"),
    ],
)
def test_each_rule_fails_alone(change: dict[str, object], rule: str) -> None:
    judged = rules(**change)
    assert [name for name, each in judged.items() if not each.passed] == [rule]
    assert not gate.verdict(list(judged.values()), "m", "d")["passed"]


@pytest.mark.parametrize(
    ("change", "rule", "reason"),
    [
        ({"kid_difference": Metric.refused("kid", 14)}, "kid_difference", "kid: n=14, needs 50"),
        ({"kid_floor": Metric.refused("kid", 30)}, "kid_difference", "kid: n=30, needs 50"),
        ({"candidate__recall": Metric.refused("recall", 14)}, "recall", "recall: n=14, needs 50"),
        ({"baseline__coverage": Metric.refused("coverage", 14)}, "coverage", "coverage: n=14, needs 50"),
        ({"candidate__copies": Metric.refused("copies", 40)}, "copies", "copies: n=40, needs 100"),
        ({"sharpness_floor": Metric.refused("sharpness", 3)}, "sharpness", "sharpness: n=3, needs 20"),
    ],
)
def test_a_refused_metric_fails_its_rule_for_that_reason(
    change: dict[str, object], rule: str, reason: str
) -> None:
    judged = rules(**change)[rule]
    assert not judged.passed
    assert judged.value is None
    assert judged.reason == reason


def test_a_number_that_is_not_finite_fails_its_rule() -> None:
    assert not rules(candidate__recall=Metric(math.nan, 90))["recall"].passed
    assert not rules(kid_difference=Metric(math.inf, 90, 0.0, math.inf))["kid_difference"].passed


def test_the_margin_is_half_the_floors_width_by_default() -> None:
    assert rules()["kid_difference"].threshold == pytest.approx(0.02)
    wide = dataclasses.replace(THRESHOLDS, kid_margin=0.5)
    judged = rules(wide, kid_difference=Metric(0.3, 90, 0.1, 0.4), kid_floor=Metric.refused("kid", 3))
    assert judged["kid_difference"].passed
    assert judged["kid_difference"].threshold == 0.5


def test_a_better_kid_passes_without_a_margin() -> None:
    tiny = dataclasses.replace(THRESHOLDS, kid_margin=1e-9)
    assert rules(tiny, kid_difference=Metric(-0.1, 90, -0.2, -0.01))["kid_difference"].passed


def test_sharpness_within_the_noise_of_real_images_passes_even_if_the_baseline_is_closer() -> None:
    judged = rules(baseline__top_octave=Metric(0.001, 90), candidate__top_octave=Metric(0.09, 90))
    assert judged["sharpness"].passed
