"""Every rule of the gate passes, fails and is undecided where it should."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation import gate
from pipeline.evaluation.estimates import Estimates
from pipeline.evaluation.evidence import Evidence, Measured
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.verdict import Rule
from tests.evaluation.evidence import CANDIDATE, evidence, images

THRESHOLDS = gate.Thresholds(
    recall_margin=0.1, coverage_margin=0.1, sharpness_margin=0.1, caption_margin=0.05, max_copy_excess=0.15
)
N = 240  # images


def rules(given: Evidence) -> dict[str, Rule]:
    """The rules of one pass by name."""
    (verdict,) = gate.judge(given, THRESHOLDS)
    return {rule.name: rule for rule in verdict.rules}


def candidate(split: str = "train", **changes: np.ndarray) -> dict[str, Measured]:
    """A good candidate with some of its measurements changed, on one caption set."""
    return {split: replace(images(np.random.default_rng(5), N), **changes)}  # type: ignore[arg-type]


def draws(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(6).uniform(low, high, N)


def test_a_model_like_the_baseline_passes_with_enough_families() -> None:
    (verdict,) = gate.judge(evidence(400), THRESHOLDS)
    assert verdict.outcome == "passed", [str(rule) for rule in verdict.obstacles]
    assert (verdict.passes, verdict.nfe) == (1, 2)
    assert [rule.name for rule in verdict.rules] == [
        "finite",
        "extractors",
        "kid_randconv",
        "equal_cost_randconv",
        "heldout_randconv",
        "recall",
        "coverage",
        "sharpness",
        "captions",
        "copies",
        "replicas",
    ]
    assert all(rule.families == 400 for rule in verdict.rules if rule.low is not None)


FAULTS = {
    "kid_randconv": candidate(features={"randconv": np.random.default_rng(1).standard_normal((N, 8)) + 0.5}),
    "heldout_randconv": candidate(
        "heldout", features={"randconv": np.random.default_rng(1).standard_normal((N, 8)) + 0.6}
    ),
    "recall": candidate(features={"randconv": 0.3 * np.random.default_rng(2).standard_normal((N, 8))}),
    "coverage": candidate(
        features={"randconv": np.tile(np.random.default_rng(2).standard_normal((12, 8)), (20, 1))}
    ),
    "sharpness": candidate(power=draws(40, 60)),
    "captions": candidate(caption_rank=draws(0.2, 0.8)),
    "copies": candidate("heldout", rho=draws(0.0, 1.0)),
    "replicas": candidate("heldout", rho=draws(0.0, 0.3), distance=draws(0, 5)),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_each_fault_fails_its_rule(rule: str) -> None:
    judged = rules(evidence(candidate=FAULTS[rule]))
    assert judged[rule].outcome == "failed", str(judged[rule])
    assert judged[rule].reason


def half_missing() -> np.ndarray:
    """Features like real ones, but for those on one side, which are on the other."""
    features = np.random.default_rng(2).standard_normal((N, 8))
    features[:, 0] = np.abs(features[:, 0])
    return features


UNSURE = {
    "kid_randconv": candidate(features={"randconv": np.random.default_rng(1).standard_normal((N, 8)) + 0.2}),
    "equal_cost_randconv": candidate(
        features={"randconv": np.random.default_rng(1).standard_normal((N, 8)) + 0.2}
    ),
    "heldout_randconv": candidate(
        "heldout", features={"randconv": np.random.default_rng(1).standard_normal((N, 8)) + 0.3}
    ),
    "recall": candidate(features={"randconv": half_missing()}),
    "coverage": candidate(features={"randconv": half_missing()}),
    "sharpness": candidate(power=draws(60, 160)),
    "captions": candidate(caption_rank=draws(0.7, 1.0)),
    "replicas": candidate(
        "heldout", rho=np.where(np.arange(N) < 4, 0.1, 0.5), distance=np.where(np.arange(N) < 4, 1.0, 30.0)
    ),
}


@pytest.mark.parametrize("rule", UNSURE)
def test_each_rule_is_undecided_where_its_interval_holds_the_threshold(rule: str) -> None:
    judged = rules(evidence(candidate=UNSURE[rule]))[rule]
    assert judged.outcome == "undecided", str(judged)
    assert judged.low is not None
    assert judged.high is not None
    assert judged.threshold is not None
    assert judged.low <= judged.threshold <= judged.high
    assert judged.reason is not None
    assert judged.reason.startswith("undecided: 120 families, ")


def test_copies_are_undecided_where_many_real_images_are_alike() -> None:
    """An excess of 5% from 120 families on either side: neither certainly above 0 nor below 15%."""
    rng = np.random.default_rng(0)
    alike = [np.where((rng.permutation(N // 2) < share * N / 2).repeat(2), 0.2, 0.5) for share in (0.55, 0.5)]
    given = evidence(candidate=candidate("heldout", rho=alike[0]))
    rule = rules(replace(given, reference=replace(given.reference, rho=alike[1])))["copies"]
    assert rule.outcome == "undecided", str(rule)
    assert rule.threshold == 0.15


def test_the_threshold_of_copies_is_the_one_that_decided() -> None:
    """0 where their excess is certain, none where the rank test alone finds them, which no interval shows."""
    given = evidence()
    assert rules(given)["copies"].threshold == 0.15
    certain = rules(evidence(candidate=candidate("heldout", rho=draws(0.2, 1.0))))["copies"]
    assert (certain.outcome, certain.threshold) == ("failed", 0.0)
    assert certain.low is not None
    assert certain.low > 0
    nearer = rules(evidence(candidate=candidate("heldout", rho=draws(0.34, 0.7))))["copies"]
    assert (nearer.outcome, nearer.threshold) == ("failed", None)
    assert nearer.reason is not None
    assert "a rank test finds samples nearer to one family than real images (z -" in nearer.reason


@pytest.mark.parametrize("power", [draws(40, 60), draws(180, 220)])
def test_blurrier_and_harsher_images_fail_alike(power: np.ndarray) -> None:
    assert rules(evidence(candidate=candidate(power=power)))["sharpness"].outcome == "failed"


def test_a_model_worse_than_the_fine_tuned_one_at_equal_cost_fails_that_rule_alone() -> None:
    given = evidence()
    good = given.measured["train"]
    worse = images(np.random.default_rng(3), N, shift=0.4)
    measured = {**given.measured, "train": {**good, "finetuned": worse, CANDIDATE: worse}}
    judged = rules(replace(given, measured=measured))
    assert judged["equal_cost_randconv"].outcome == "failed"
    assert judged["kid_randconv"].outcome == "passed"


def test_without_a_setting_of_equal_cost_there_is_no_such_rule() -> None:
    assert "equal_cost_randconv" not in rules(evidence(equal_cost={}))


def test_few_families_leave_it_undecided_and_say_about_how_many_are_needed() -> None:
    rule = rules(evidence(30))["kid_randconv"]
    assert rule.outcome == "undecided"
    assert rule.reason is not None
    assert rule.reason.startswith("undecided: 30 families, about ")
    needed = int(rule.reason.split("about ")[1].split()[0])
    assert 30 < needed < 3000


@pytest.mark.parametrize(
    ("value", "half", "needed"),
    [(0.0, 0.2, "about 400 needed; raise data.split.test, or add images"), (0.099, 5.0, "hardly decide")],
)
def test_the_families_needed_follow_from_width_and_distance(value: float, half: float, needed: str) -> None:
    metric = Metric(value, 200, value - half, value + half, families=100)
    assert gate.undecided(metric, 0.1, gate.MORE_FAMILIES["heldout"]).endswith(needed)


@pytest.mark.parametrize(
    ("split", "per_family", "advice"),
    [
        ("train", 2, "add images"),
        ("heldout", 2, "raise data.split.test, or add images"),
        ("train", 1, "lower promotion.precision, and raise evaluate.max_calls if it limits"),
        ("heldout", 1, "lower promotion.precision, and raise evaluate.max_calls if it limits"),
    ],
)
def test_more_families_come_from_more_samples_while_each_shows_another(
    split: str, per_family: int, advice: str
) -> None:
    given = evidence()
    drawn = given.conditions[split]
    numbers = drawn.families if per_family == 2 else np.arange(N)
    given = replace(given, conditions={**given.conditions, split: replace(drawn, families=numbers)})
    assert gate.more_families(Estimates(given, split)) == advice


def test_too_few_images_leave_every_measured_rule_undecided_for_that_reason() -> None:
    judged = rules(evidence(8))
    assert judged["kid_randconv"].reason == "kid: n=16, needs 50"
    assert judged["copies"].reason == "copies: n=16, needs 50"
    assert judged["replicas"].outcome == "undecided"
    (verdict,) = gate.judge(evidence(8), THRESHOLDS)
    assert verdict.outcome == "undecided"


def test_weights_that_are_not_finite_fail() -> None:
    assert rules(evidence(not_finite=[CANDIDATE]))["finite"].outcome == "failed"


def test_features_that_are_not_finite_fail_and_do_not_pass_in_silence() -> None:
    broken = candidate(features={"randconv": np.full((N, 8), np.nan)})
    assert rules(evidence(candidate=broken))["kid_randconv"].outcome == "failed"


def test_without_a_qualified_extractor_nothing_passes() -> None:
    (verdict,) = gate.judge(evidence(400, extractors=[]), THRESHOLDS)
    assert verdict.outcome == "undecided"
    assert "no feature extractor" in str(verdict.obstacles[0])


def test_the_verdict_is_the_same_from_the_stored_file(tmp_path: Path) -> None:
    given = evidence()
    given.save(tmp_path / "evidence.safetensors")
    first = (tmp_path / "evidence.safetensors").read_bytes()
    loaded = Evidence.load(tmp_path / "evidence.safetensors")
    assert loaded.description == given.description
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    assert gate.judge(loaded, THRESHOLDS) == gate.judge(loaded, THRESHOLDS)
    for mine, stored in zip(gate.judge(given, THRESHOLDS), gate.judge(loaded, THRESHOLDS), strict=True):
        assert [rule.outcome for rule in mine.rules] == [rule.outcome for rule in stored.rules]


def test_copies_among_real_images_that_are_alike_too_are_no_excess() -> None:
    """A third of the samples is much nearer to one family, and so is a third of the real images of that group."""
    rho = np.where(np.arange(N) // 2 % 3 == 0, 0.1, 0.8) + np.random.default_rng(1).uniform(0, 0.1, N)
    given = evidence(candidate=candidate("heldout", rho=rho))
    assert rules(given)["copies"].outcome == "failed"
    alike = replace(given.reference, rho=rho)
    assert rules(replace(given, reference=alike))["copies"].outcome == "passed"
