"""The rules by which a refined model may become the champion: a pure function of measured numbers.

The claim is speed: in far fewer network calls, the candidate is not worse than the baseline by more than the noise.
A rule fails if its metric was refused, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation.metrics import Metric, rounded


@dataclass(frozen=True)
class Rule:
    """One rule: its value, the threshold, and why it passed or failed."""

    name: str
    passed: bool
    value: float | None
    threshold: float | None
    reason: str


@dataclass(frozen=True)
class Thresholds:
    """See params.yaml, `promotion`. A kid_margin of 0 means half the width of the floor's 95% interval."""

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
        kid_floor: KID of two halves of the real images, with its interval.
        sharpness_floor: |log ratio| of top-octave power between two sets of real images.
        finite: whether all weights are finite.
    """
    return [
        _kid(kid_difference, kid_floor, thresholds.kid_margin),
        _at_least("recall", candidate["recall"], baseline["recall"], thresholds.min_recall),
        _at_least("coverage", candidate["coverage"], baseline["coverage"], thresholds.min_coverage),
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


def _known(value: float | None) -> float:
    assert value is not None, "rules return early on refused metrics"
    return value


def _kid(difference: Metric, floor: Metric, margin: float) -> Rule:
    name = "kid_difference"
    needed = (difference,) if margin else (difference, floor)
    refused = _refused(name, *needed)
    if refused:
        return refused
    if not margin:
        margin = (_known(floor.high) - _known(floor.low)) / 2
    upper = _known(difference.high)
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


def _at_least(name: str, candidate: Metric, baseline: Metric, fraction: float) -> Rule:
    refused = _refused(name, candidate, baseline)
    if refused:
        return refused
    value, reference = _known(candidate.value), _known(baseline.value)
    passed = value >= fraction * reference
    reason = f"{'at least' if passed else 'below'} {fraction:g} of the baseline's {reference:.3f}"
    return Rule(name, passed, rounded(value), rounded(fraction * reference), reason)


def _copies(copies: Metric, limit: float) -> Rule:
    refused = _refused("copies", copies)
    if refused:
        return refused
    fraction = _known(copies.value)
    reason = f"{fraction:.2%} of {copies.n} samples copy a training image"
    return Rule("copies", fraction <= limit, rounded(fraction), rounded(limit), reason)


def _sharpness(candidate: Metric, baseline: Metric, floor: Metric) -> Rule:
    refused = _refused("sharpness", candidate, baseline, floor)
    if refused:
        return refused
    value, reference, noise = (_known(metric.value) for metric in (candidate, baseline, floor))
    gap, limit = abs(value), max(abs(reference), noise)
    passed = gap <= limit
    if passed:
        reason = "closer to the real images than the baseline, or as close as two real sets are"
    else:
        kind = "blurrier" if value < 0 else "harsher"
        reason = f"{kind} than the real images, by more than the baseline"
    return Rule("sharpness", passed, rounded(gap), rounded(limit), reason)


def verdict(rules: list[Rule], model_digest: str, data_digest: str) -> dict[str, Any]:
    """The content of reports/verdict.json: passed if every rule passed."""
    return {
        "passed": all(rule.passed for rule in rules),
        "model_digest": model_digest,
        "data_digest": data_digest,
        "rules": [asdict(rule) for rule in rules],
    }
