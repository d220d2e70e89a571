"""The rules by which a refined model may become the champion: a pure function of the evidence.

The claim is speed: in a few passes, the model is not worse than the baseline by more than what nobody sees,
and not worse than the fine-tuned model at equal cost. A rule is about an interval: it passes where the whole
interval is good, fails where the whole interval is bad, and is undecided otherwise, with the evidence that
would decide. Two rules differ: `replicas` passes by its value, since a single replica among 200 samples has an
interval beyond any useful limit, and `copies` also fails by a rank test. A measurement that was refused leaves
its rule undecided, for the same reason; weights that are not finite fail. Where images have no captions, or all
the same, the rules about captions are not applicable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.evaluation.estimates import Estimates, copy_excess, estimates_of
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics import Metric, rounded
from pipeline.evaluation.verdict import Outcome, PassVerdict, Rule, combine, families_needed

MAX_REPLICAS = 0.01
RANK_Z = (
    -3.0
)  # of the rank test on copies, below which samples are nearer to the training images than real ones
MORE_FAMILIES = {"train": "add images", "heldout": "raise data.split.test, or add images"}
MORE_SAMPLES = "lower promotion.precision, and raise evaluate.max_calls if it limits"
HOPELESS = 100  # times as many families as there are: no reasonable data set decides


@dataclass(frozen=True)
class Thresholds:
    """See params.yaml, `promotion`."""

    recall_margin: float
    coverage_margin: float
    sharpness_margin: float
    caption_margin: float
    max_copy_excess: float


def judge(evidence: Evidence, thresholds: Thresholds) -> list[PassVerdict]:
    """A verdict for each number of passes, in ascending order."""
    return judge_estimates(estimates_of(evidence), thresholds)


def judge_estimates(estimates: Mapping[str, Estimates], thresholds: Thresholds) -> list[PassVerdict]:
    """`judge`, by the estimates of each caption set."""
    candidates = estimates["train"].evidence.description.candidates
    return [
        judge_contender(estimates, passes, name, thresholds) for passes, name in sorted(candidates.items())
    ]


def judge_contender(
    estimates: Mapping[str, Estimates], passes: int, name: str, thresholds: Thresholds
) -> PassVerdict:
    """The verdict on one contender, which makes an image in so many passes, or steps."""
    rules = tuple(_rules(estimates, passes, name, thresholds))
    nfe = estimates["train"].evidence.description.nfe[name]
    return PassVerdict(passes, nfe, combine(rule.outcome for rule in rules), rules)


def _rules(
    estimates: Mapping[str, Estimates], passes: int, name: str, thresholds: Thresholds
) -> Iterator[Rule]:
    train, heldout = estimates["train"], estimates["heldout"]
    about, advice = train.evidence.description, more_families(train)
    yield _finite(name not in about.not_finite)
    yield _qualified(about.extractors)
    for extractor in about.extractors:
        floor = about.floors.get(f"train/{extractor}")
        margin = about.margins[extractor]
        difference = train.kid_difference(name, about.baseline, extractor)
        yield _at_most(f"kid_{extractor}", difference, margin, "the baseline", advice, floor)
        equal = about.equal_cost.get(passes)
        if equal is not None:
            difference = train.kid_difference(name, equal, extractor)
            yield _at_most(
                f"equal_cost_{extractor}",
                difference,
                margin,
                "the fine-tuned model at equal cost",
                advice,
                floor,
            )
        yield _heldout(heldout, name, extractor)
    for extractor in about.extractors[:1]:
        for key, margin in (("recall", thresholds.recall_margin), ("coverage", thresholds.coverage_margin)):
            yield _at_least(train, key, name, extractor, margin)
    yield _at_most(
        "sharpness",
        train.sharpness_excess(name, about.baseline),
        thresholds.sharpness_margin,
        "the baseline",
        advice,
    )
    yield _captions(train, name, about.baseline, thresholds.caption_margin)
    yield _copies(heldout, name, thresholds.max_copy_excess)
    yield _replicas(heldout, name)


def _heldout(estimates: Estimates, name: str, extractor: str) -> Rule:
    about, rule = estimates.evidence.description, f"heldout_{extractor}"
    if reason := about.uncaptioned.get("heldout"):
        return Rule(rule, "not_applicable", reason=reason)
    difference = estimates.kid_difference(name, about.baseline, extractor)
    floor, margin = about.floors.get(f"heldout/{extractor}"), about.heldout_margins[extractor]
    return _at_most(rule, difference, margin, "the baseline", more_families(estimates), floor)


def _finite(finite: bool) -> Rule:
    reason = "all weights are finite" if finite else "NaN or Inf in the weights"
    return Rule("finite", "passed" if finite else "failed", float(finite), threshold=1.0, reason=reason)


def _qualified(extractors: list[str]) -> Rule:
    if extractors:
        return Rule(
            "extractors", "passed", reason=f"{' and '.join(extractors)} can tell damage on these data"
        )
    reason = "no feature extractor can tell damage on these data; add images, or other evaluate.extractors"
    return Rule("extractors", "undecided", reason=reason)


def _refused(name: str, metric: Metric) -> Rule | None:
    numbers = (metric.value, metric.low, metric.high)
    if any(number is None for number in numbers):
        return Rule(name, "undecided", families=metric.families, reason=metric.reason or "was not measured")
    if not all(math.isfinite(number) for number in numbers if number is not None):
        return Rule(name, "failed", families=metric.families, reason="is not finite")
    return None


def _interval(metric: Metric) -> tuple[float, float, float]:
    assert metric.value is not None and metric.low is not None and metric.high is not None
    return metric.value, metric.low, metric.high


def more_families(estimates: Estimates) -> str:
    """How to get intervals from more families: by more samples while each shows another one, else by more data."""
    return MORE_SAMPLES if estimates.one_of_each else MORE_FAMILIES[estimates.split]


def undecided(metric: Metric, threshold: float, advice: str) -> str:
    """Why an interval decides nothing, as in `undecided: 23 families, about 60 needed; add images`."""
    families = metric.families or 0
    needed = families_needed(families, *_interval(metric), threshold)
    if needed > HOPELESS * families:
        return (
            f"undecided: {families} families, and the value is so near the threshold that more hardly decide"
        )
    return f"undecided: {families} families, about {math.ceil(needed)} needed; {advice}"


def _decide(metric: Metric, threshold: float, good_is_low: bool) -> Outcome:
    _, low, high = _interval(metric)
    if good_is_low:
        return "passed" if high < threshold else "failed" if low > threshold else "undecided"
    return "passed" if low > threshold else "failed" if high < threshold else "undecided"


def _rule(
    name: str,
    metric: Metric,
    threshold: float | None,
    outcome: Outcome,
    reason: str,
    floor: float | None = None,
) -> Rule:
    value, low, high = (rounded(number) for number in _interval(metric))
    return Rule(name, outcome, value, low, high, rounded(threshold), rounded(floor), metric.families, reason)


def _at_most(
    name: str, difference: Metric, margin: float, other: str, advice: str, floor: float | None = None
) -> Rule:
    refused = _refused(name, difference)
    if refused:
        return refused
    outcome = _decide(difference, margin, good_is_low=True)
    _, _, high = _interval(difference)
    reason = {
        "passed": f"better than {other}" if high < 0 else f"not worse than {other} by more than the margin",
        "failed": f"worse than {other} by more than the margin",
        "undecided": undecided(difference, margin, advice),
    }[outcome]
    return _rule(name, difference, margin, outcome, reason, floor)


def _at_least(estimates: Estimates, key: str, name: str, extractor: str, margin: float) -> Rule:
    baseline = estimates.evidence.description.baseline
    difference = estimates.neighbourhood_difference(key, name, baseline, extractor)
    refused = _refused(key, difference)
    if refused:
        return refused
    outcome = _decide(difference, -margin, good_is_low=False)
    theirs = estimates.neighbourhood(baseline, extractor)[key].value
    assert theirs is not None, "the difference to it was measured"
    value, low, high = (number + theirs for number in _interval(difference))
    moved = Metric(value, difference.n, low, high, families=difference.families)
    reason = {
        "passed": f"not more than {margin:g} below the baseline's {theirs:.3f}",
        "failed": f"more than {margin:g} below the baseline's {theirs:.3f}",
        "undecided": undecided(difference, -margin, more_families(estimates)),
    }[outcome]
    return _rule(key, moved, theirs - margin, outcome, reason, theirs)


def _captions(estimates: Estimates, name: str, baseline: str, margin: float) -> Rule:
    if not estimates.judges_captions:
        unknown = "no image to learn from has a caption"
        reason = estimates.evidence.description.uncaptioned.get(estimates.split, unknown)
        return Rule("captions", "not_applicable", reason=reason)
    difference = estimates.caption_difference(name, baseline)
    refused = _refused("captions", difference)
    if refused:
        return refused
    outcome = _decide(difference, -margin, good_is_low=False)
    reason = {
        "passed": "shows what captions say about as well as the baseline",
        "failed": "shows what captions say less well than the baseline",
        "undecided": undecided(difference, -margin, more_families(estimates)),
    }[outcome]
    return _rule("captions", difference, -margin, outcome, reason)


def _copies(estimates: Estimates, name: str, limit: float) -> Rule:
    """Fails where samples are certainly more alike to training images than other real images are, above 0 or by the
    rank test; passes where the excess is certainly below `limit`, so that too little evidence does not pass. The
    threshold of the rule is the one that decided."""
    excess = copy_excess(estimates, name)
    refused = _refused("copies", excess.excess)
    if refused:
        return refused
    _, low, high = _interval(excess.excess)
    outcome: Outcome
    near = (
        f"{excess.share:.1%} of samples, {excess.floor:.1%} of real images are much nearer to one training family "
        "than to all others"
    )
    threshold: float | None = limit
    if low > 0:
        outcome, threshold, reason = "failed", 0.0, near
    elif excess.z < RANK_Z:
        reason = f"a rank test finds samples nearer to one family than real images (z {excess.z:.1f}); {near}"
        outcome, threshold = "failed", None
    elif high < limit:
        outcome, reason = "passed", near
    else:
        outcome, reason = "undecided", undecided(excess.excess, limit, more_families(estimates))
    return _rule("copies", excess.excess, threshold, outcome, reason, excess.floor)


def _replicas(estimates: Estimates, name: str) -> Rule:
    """An absolute limit, as no real image of another family is so near: passes where the share is within it, fails
    where the interval is above it."""
    share = estimates.replicas(name)
    refused = _refused("replicas", share)
    if refused:
        return refused
    value, low, _ = _interval(share)
    outcome: Outcome = "passed" if value <= MAX_REPLICAS else "failed" if low > MAX_REPLICAS else "undecided"
    reason = f"{value:.1%} of {share.n} samples are almost equal to a training image"
    if outcome == "undecided":
        reason = f"{undecided(share, MAX_REPLICAS, more_families(estimates))}; {reason}"
    return _rule("replicas", share, MAX_REPLICAS, outcome, reason)
