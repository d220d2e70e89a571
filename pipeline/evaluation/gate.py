"""The rules by which a refined model may become the champion. A pure function of measured numbers.

The claim is speed: in far fewer network calls than the baseline, no worse than it by more than the noise.
A rule whose metric was refused is not met, for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation.metrics import Metric, rounded


@dataclass(frozen=True)
class Rule:
    """One rule: the value found, the threshold it is held against, and why it passed or not."""

    name: str
    passed: bool
    value: float | None
    threshold: float | None
    reason: str


@dataclass(frozen=True)
class Thresholds:
    """See params.yaml, `promotion`. A kid_margin of 0 is half the width of the floor's 95% interval."""

    kid_margin: float
    max_copies: float
    min_recall: float
    min_coverage: float


def decide(
    candidate: Mapping[str, Metric],
    baseline: Mapping[str, Metric],
    kid_difference: Metric,
    kid_floor: Metric,
    sharpness_floor: Metric,
    finite: bool,
    thresholds: Thresholds,
) -> list[Rule]:
    """Judge the candidate.

    Args:
        candidate, baseline: `recall`, `coverage`, `copies`, `top_octave` on held-out captions.
        kid_difference: candidate minus baseline, paired, with its interval.
        kid_floor: KID of two real halves, with its interval.
        sharpness_floor: the gap that two sets of real images have.
        finite: whether all weights and numbers are.
    """
    return [
        _kid(kid_difference, kid_floor, thresholds.kid_margin),
        _share("recall", candidate["recall"], baseline["recall"], thresholds.min_recall),
        _share("coverage", candidate["coverage"], baseline["coverage"], thresholds.min_coverage),
        _copies(candidate["copies"], thresholds.max_copies),
        _sharpness(candidate["top_octave"], baseline["top_octave"], sharpness_floor),
        _finite(finite),
    ]


def _refused(name: str, *metrics: Metric) -> Rule | None:
    for metric in metrics:
        if metric.value is None:
            return Rule(name, False, None, None, metric.reason or f"{name}: was not measured")
        if not math.isfinite(metric.value):
            return Rule(name, False, None, None, f"{name}: is not finite")
    return None


def _given(value: float | None) -> float:
    assert value is not None, "refused metrics are sorted out first"
    return value


def _kid(difference: Metric, floor: Metric, margin: float) -> Rule:
    name = "kid_difference"
    needed = (difference,) if margin else (difference, floor)
    refused = _refused(name, *needed)
    if refused:
        return refused
    if not margin:
        margin = (_given(floor.high) - _given(floor.low)) / 2
    upper = _given(difference.high)
    if upper < 0:
        return Rule(name, True, rounded(upper), rounded(margin), "better than the baseline (95%)")
    passed = upper < margin
    text = (
        "not worse than the baseline by more than the noise" if passed else "may be worse than the baseline"
    )
    return Rule(name, passed, rounded(upper), rounded(margin), f"{text}: upper end of the 95% interval")


def _finite(finite: bool) -> Rule:
    reason = "all weights are finite" if finite else "NaN or Inf in the weights"
    return Rule("finite", finite, float(finite), 1.0, reason)


def _share(name: str, candidate: Metric, baseline: Metric, least: float) -> Rule:
    refused = _refused(name, candidate, baseline)
    if refused:
        return refused
    value, theirs = _given(candidate.value), _given(baseline.value)
    passed = value >= least * theirs
    reason = f"{'at least' if passed else 'below'} {least:g} of the baseline's {theirs:.3f}"
    return Rule(name, passed, rounded(value), rounded(least * theirs), reason)


def _copies(found: Metric, most: float) -> Rule:
    refused = _refused("copies", found)
    if refused:
        return refused
    share = _given(found.value)
    reason = f"{share:.2%} of {found.n} samples copy a training image"
    return Rule("copies", share <= most, rounded(share), rounded(most), reason)


def _sharpness(candidate: Metric, baseline: Metric, floor: Metric) -> Rule:
    refused = _refused("sharpness", candidate, baseline, floor)
    if refused:
        return refused
    value, theirs, noise = (_given(metric.value) for metric in (candidate, baseline, floor))
    gap, limit = abs(value), max(abs(theirs), noise)
    passed = gap <= limit
    if passed:
        reason = "closer to the real images than the baseline, or as close as two real sets are"
    else:
        kind = "blurrier" if value < 0 else "harsher"
        reason = f"{kind} than the real images, by more than the baseline"
    return Rule("sharpness", passed, rounded(gap), rounded(limit), reason)


def verdict(rules: list[Rule], model_digest: str, data_digest: str) -> dict[str, Any]:
    """What reports/verdict.json holds: passed if every rule is."""
    return {
        "passed": all(rule.passed for rule in rules),
        "model_digest": model_digest,
        "data_digest": data_digest,
        "rules": [asdict(rule) for rule in rules],
    }
