"""Bootstraps and floors, against plain loops and against the theory of samples of one distribution."""

import numpy as np
import pytest

from pipeline.evaluation import statistics
from pipeline.evaluation.metrics import cubic_kernel, kid


def normal(n: int, seed: int, d: int = 4, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng([seed, n]).normal(size=(n, d)) + shift


def test_kid_by_family_is_plain_kid_if_every_image_is_its_own_family() -> None:
    x, y = normal(8, 0), normal(6, 1, shift=1)
    (ux, uy), num_families = statistics.number_families(
        [f"x{i}" for i in range(8)], [f"y{i}" for i in range(6)]
    )
    result = statistics.kid_by_family(x, ux, y, uy, np.ones((1, num_families)))
    assert result[0] == pytest.approx(kid(x, y), rel=1e-12)


def test_a_bootstrap_equals_the_sums_over_the_drawn_images() -> None:
    rng = np.random.default_rng(0)
    x, y = normal(7, 0), normal(9, 1)
    families_x = list("abcdeff")
    families_y = list("aabbccghh")  # shares families with x, two samples of some
    (ux, uy), num_families = statistics.number_families(families_x, families_y)
    counts = statistics.resample_counts(num_families, rng, times=5)

    def mean(a: np.ndarray, ua: np.ndarray, b: np.ndarray, ub: np.ndarray, c: np.ndarray) -> float:
        total = pairs = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if ua[i] != ub[j]:
                    weight = c[ua[i]] * c[ub[j]]
                    total += weight * cubic_kernel(a[i : i + 1], b[j : j + 1])[0, 0]
                    pairs += weight
        return total / pairs

    expected = [mean(x, ux, x, ux, c) + mean(y, uy, y, uy, c) - 2 * mean(x, ux, y, uy, c) for c in counts]
    assert statistics.kid_by_family(x, ux, y, uy, counts) == pytest.approx(expected, rel=1e-10)


def test_more_samples_of_each_caption_do_not_bias_kid() -> None:
    """Real and generated from one distribution, where the samples of a caption are nearly equal."""
    values = []
    for seed in range(200):
        real, captions = normal(30, seed), normal(30, seed + 5000)
        fake = np.concatenate([captions + 0.01 * normal(30, seed + 9000 + i) for i in range(4)])
        family = np.arange(30)
        values.append(statistics.kid_by_family(real, family, fake, np.tile(family, 4), np.ones((1, 30)))[0])
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5


def test_resampling_draws_as_many_families_as_there_are() -> None:
    counts = statistics.resample_counts(13, np.random.default_rng(0), times=50)
    assert counts.shape == (50, 13)
    assert (counts.sum(1) == 13).all()


def test_the_interval_of_kid_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(40):
        real, fake = normal(60, seed), normal(60, seed + 5000)  # the true distance is 0
        (a, b), num_families = statistics.number_families(
            [f"r{i}" for i in range(60)], [f"f{i}" for i in range(60)]
        )
        counts = statistics.resample_counts(num_families, np.random.default_rng(seed), times=100)
        metric = statistics.KidSamples.measure(real, a, fake, b, counts).metric
        assert metric.low is not None
        assert metric.high is not None
        covered += metric.low <= 0 <= metric.high
    assert covered >= 33


def test_at_most_so_many_numbers_are_evenly_spaced() -> None:
    np.testing.assert_array_equal(statistics.spaced(90, 60)[:4], [0, 1, 3, 4])
    np.testing.assert_array_equal(statistics.spaced(10, 4), [0, 2, 5, 7])
    np.testing.assert_array_equal(statistics.spaced(5, 60), range(5))
    assert statistics.spaced(0, 60).size == 0


def test_two_halves_of_one_set_are_zero_apart_within_their_interval() -> None:
    real = normal(220, 3)
    floor = statistics.kid_of_halves(real, [str(i) for i in range(220)], 60, np.random.default_rng(0))
    assert floor.n == 60
    assert floor.low is not None
    assert floor.high is not None
    assert floor.low < 0 < floor.high
    assert abs(floor.value or 0) < (floor.high - floor.low) / 4


def test_halves_never_split_a_family() -> None:
    """Pairs of equal images in both halves would pull KID below zero."""
    real = np.repeat(normal(110, 4), 2, axis=0)
    families = [str(i // 2) for i in range(220)]
    together = statistics.kid_of_halves(real, families, 100, np.random.default_rng(0))
    assert abs(together.value or 0) < 0.1 * ((together.high or 0) - (together.low or 0))


def test_too_few_images_refuse_a_floor() -> None:
    floor = statistics.kid_of_halves(normal(20, 0), [str(i) for i in range(20)], 10, np.random.default_rng(0))
    assert floor.value is None
    assert floor.reason == "kid: n=10, needs 50"


def test_floors_depend_on_the_seed_alone() -> None:
    real = normal(120, 5)
    families = [str(i) for i in range(120)]
    first, second = (
        statistics.kid_of_halves(real, families, 60, statistics.generator(7, "floor")) for _ in range(2)
    )
    assert first == second
