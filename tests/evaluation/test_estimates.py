"""Numbers equal independent ones, and their intervals hold the truth about as often as they claim."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from pipeline.evaluation import metrics
from pipeline.evaluation.estimates import Estimates, copy_excess
from pipeline.evaluation.evidence import Conditions, Evidence, Measured, Reference
from pipeline.evaluation.memorisation import ALIKE
from tests.evaluation.evidence import BASELINE, CANDIDATE, evidence, images


def one_each(given: Evidence) -> Evidence:
    """The same with one image per family, in which families are images."""
    conditions = {
        split: Conditions(
            each.families[::2],
            each.groups[::2],
            each.power[::2],
            {name: features[::2] for name, features in each.real.items()},
            each.real_families[::2],
        )
        for split, each in given.conditions.items()
    }
    measured = {
        split: {name: first_of_two(each) for name, each in by_name.items()}
        for split, by_name in given.measured.items()
    }
    return replace(given, conditions=conditions, measured=measured)


def first_of_two(each: Measured) -> Measured:
    features = {name: values[::2] for name, values in each.features.items()}
    return Measured(features, each.power[::2], each.caption_rank[::2], each.rho[::2], each.distance[::2])


def test_numbers_of_single_images_equal_the_plain_metrics() -> None:
    given = one_each(evidence())
    estimates = Estimates(given, "train")
    real = given.conditions["train"].real["randconv"]
    mine, theirs = (given.measured["train"][name] for name in (CANDIDATE, BASELINE))
    fake = mine.features["randconv"]
    # Pairs of an image and its caption's own real image are left out, which the plain metric counts.
    between = metrics.cubic_kernel(real, fake)
    paired = 2 * (between.mean() - (between.sum() - between.trace()) / (between.size - len(between)))
    kid = estimates.kid(CANDIDATE, "randconv")
    assert kid.value == pytest.approx(metrics.kid(real, fake) + paired, rel=1e-9)
    for key, value in metrics.prdc(real, fake).items():
        assert estimates.neighbourhood(CANDIDATE, "randconv")[key].value == pytest.approx(value)
    gap = metrics.log_power_gap(given.conditions["train"].power, mine.power)
    assert estimates.top_octave(CANDIDATE).value == pytest.approx(gap)
    difference = (mine.caption_rank - theirs.caption_rank).mean()
    assert estimates.caption_difference(CANDIDATE, BASELINE).value == pytest.approx(difference)
    assert estimates.alike(CANDIDATE).value == (mine.rho < ALIKE).mean()


def test_a_difference_from_oneself_is_zero_with_an_interval_of_no_width() -> None:
    estimates = Estimates(evidence(), "train")
    for metric in (
        estimates.kid_difference(BASELINE, BASELINE, "randconv"),
        estimates.sharpness_excess(BASELINE, BASELINE),
        estimates.caption_difference(BASELINE, BASELINE),
        estimates.neighbourhood_difference("recall", BASELINE, BASELINE, "randconv"),
    ):
        assert (metric.value, metric.low, metric.high) == (0, 0, 0)


def imperfect(given: Evidence, shift: float, seed: int) -> Evidence:
    """The same with a baseline and a candidate that are equally far from real images, and equally blurred."""
    rng = np.random.default_rng([seed, 1])
    n = len(given.conditions["train"].families)
    drawn = {name: images(rng, n, shift) for name in (BASELINE, CANDIDATE)}
    changed = {name: replace(each, power=each.power * (1 - shift)) for name, each in drawn.items()}
    return replace(given, measured={**given.measured, "train": {**given.measured["train"], **changed}})


@pytest.mark.parametrize(
    ("kind", "shift", "widest"),
    [
        ("kid", 0.3, 1.4),
        ("kid", 0.0, 2.3),  # of models as good as real images, see Estimates.kid_difference
        ("recall", 0.0, 1.4),
        ("coverage", 0.0, 1.4),
        ("sharpness", 0.2, 1.4),
        ("sharpness", 0.0, 2.3),  # the same: there the sign of the gap is left open
        ("captions", 0.0, 1.4),
    ],
)
def test_intervals_of_a_true_difference_of_zero_hold_zero_and_are_as_wide_as_they_say(
    kind: str, shift: float, widest: float
) -> None:
    """In 40 repetitions two equally good models differ in at most 7 (95%: 0 to 4; 3.3 standard deviations), and the
    mean half width is 1.96 standard deviations over the repetitions (which are known to 11%)."""
    missed, values, widths = 0, [], []
    for seed in range(40):
        estimates = Estimates(imperfect(evidence(60, seed=seed), shift, seed), "train")
        metric = {
            "kid": lambda e: e.kid_difference(CANDIDATE, BASELINE, "randconv"),
            "recall": lambda e: e.neighbourhood_difference("recall", CANDIDATE, BASELINE, "randconv"),
            "coverage": lambda e: e.neighbourhood_difference("coverage", CANDIDATE, BASELINE, "randconv"),
            "sharpness": lambda e: e.sharpness_excess(CANDIDATE, BASELINE),
            "captions": lambda e: e.caption_difference(CANDIDATE, BASELINE),
        }[kind](estimates)
        assert metric.value is not None
        assert metric.low is not None
        assert metric.high is not None
        missed += not metric.low <= 0 <= metric.high
        values.append(metric.value)
        widths.append((metric.high - metric.low) / 2)
    assert missed <= 7
    assert 0.6 < np.mean(widths) / (1.96 * np.std(values)) < widest


def test_few_families_have_a_value_and_no_interval() -> None:
    """Also few families of real images alone, and in the reference of copies."""
    given = evidence(60)
    train = given.conditions["train"]
    few = replace(
        train, real={"randconv": train.real["randconv"][:38]}, real_families=train.real_families[:38]
    )
    assert Estimates(evidence(25), "train").kid(CANDIDATE, "randconv").low is not None
    cut = Estimates(replace(given, conditions={"train": few}), "train")
    assert cut.kid(CANDIDATE, "randconv").reason == "kid: n=38, needs 50"
    repeated = replace(
        train,
        real={"randconv": np.repeat(few.real["randconv"], 2, 0)},
        real_families=np.repeat(few.real_families, 2),
    )
    kid = Estimates(replace(given, conditions={"train": repeated}), "train").kid(CANDIDATE, "randconv")
    assert (kid.reason, kid.low, kid.n) == ("kid: 19 families, an interval needs 20", None, 76)
    assert kid.value is not None
    rank = Estimates(evidence(19), "train").caption_rank(CANDIDATE)
    assert (rank.reason, rank.low) == ("retrieval: 19 families, an interval needs 20", None)
    known = given.reference
    reference = replace(known, families=known.families % 19)
    excess = copy_excess(Estimates(replace(given, reference=reference), "heldout"), CANDIDATE).excess
    assert excess.reason == "copies: 19 families, an interval needs 20"


def test_families_are_what_counts_and_not_their_images() -> None:
    """Ten equal images of each of 60 families say no more than one of each."""
    few = one_each(evidence(60))
    many = replace(
        few,
        conditions={"train": repeat_conditions(few.conditions["train"], 10)},
        measured={"train": {n: repeat_measured(m, 10) for n, m in few.measured["train"].items()}},
    )
    once, often = (
        Estimates(each, "train").kid_difference(CANDIDATE, BASELINE, "randconv") for each in (few, many)
    )
    assert often.value == pytest.approx(once.value, rel=1e-6)
    assert often.low == pytest.approx(once.low, rel=1e-6)
    assert often.families == once.families == 60


def repeat_conditions(each: Conditions, times: int) -> Conditions:
    return Conditions(
        np.repeat(each.families, times),
        np.repeat(each.groups, times),
        np.repeat(each.power, times),
        each.real,
        each.real_families,
    )


def repeat_measured(each: Measured, times: int) -> Measured:
    return Measured(
        {name: np.repeat(values, times, 0) for name, values in each.features.items()},
        np.repeat(each.power, times),
        np.repeat(each.caption_rank, times),
        np.repeat(each.rho, times),
        np.repeat(each.distance, times),
    )


def test_the_reference_is_weighted_to_the_groups_of_the_samples() -> None:
    """Samples of the one group in which real images are alike are compared with that group alone."""
    given = one_each(evidence(120))
    clocks = given.conditions["heldout"].groups == 0
    rho = np.where(given.reference.groups == 0, 0.1, 0.9)
    given = replace(given, reference=Reference(rho, given.reference.families, given.reference.groups))
    whole = given.conditions["heldout"]
    chosen = Conditions(
        np.unique(whole.families[clocks], return_inverse=True)[1],
        whole.groups[clocks],
        whole.power[clocks],
        {name: each[clocks] for name, each in whole.real.items()},
        np.unique(whole.families[clocks], return_inverse=True)[1],
    )
    drawn = replace(images(np.random.default_rng(0), int(clocks.sum())), rho=np.full(int(clocks.sum()), 0.1))
    only = replace(given, conditions={"heldout": chosen}, measured={"heldout": {CANDIDATE: drawn}})
    excess = copy_excess(Estimates(replace(only), "heldout"), CANDIDATE)
    assert (excess.share, excess.floor) == (1.0, 1.0)


def test_the_rank_test_of_one_group_equals_that_of_mann_and_whitney() -> None:
    given = one_each(evidence(60))
    flat = Conditions(
        given.conditions["heldout"].families,
        np.zeros(60, dtype=np.int64),
        given.conditions["heldout"].power,
        given.conditions["heldout"].real,
        given.conditions["heldout"].real_families,
    )
    reference = Reference(given.reference.rho[::2], np.arange(60), np.zeros(60, dtype=np.int64))
    given = replace(given, conditions={**given.conditions, "heldout": flat}, reference=reference)
    excess = copy_excess(Estimates(given, "heldout"), CANDIDATE)
    mine = given.measured["heldout"][CANDIDATE].rho
    u = mannwhitneyu(mine, reference.rho, method="asymptotic").statistic
    assert excess.z == pytest.approx((u - 60 * 60 / 2) / np.sqrt(60 * 60 * 121 / 12), rel=1e-9)


def test_replicas_need_both_a_small_ratio_and_a_small_distance() -> None:
    given = evidence()
    drawn = given.measured["heldout"][CANDIDATE]
    rho, distance = drawn.rho.copy(), drawn.distance.copy()
    rho[:24], distance[:12] = 0.001, 1.0
    changed = {**given.measured["heldout"], CANDIDATE: replace(drawn, rho=rho, distance=distance)}
    given = replace(given, measured={**given.measured, "heldout": changed})
    assert Estimates(given, "heldout").replicas(CANDIDATE).value == pytest.approx(12 / 240)
