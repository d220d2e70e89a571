"""Metrics against independent implementations: loops from the papers' equations, scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import metrics


def features(n: int, d: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng([seed, n])
    return rng.normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d)) + shift


def test_kid_equals_the_double_sums_of_the_paper() -> None:
    x, y = features(9), features(7, seed=1, shift=0.4)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    within_x = sum(k(x[i], x[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    within_y = sum(k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    between = sum(k(a, b) for a in x for b in y) / (9 * 7)
    assert metrics.kid(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_kid_of_two_samples_of_one_distribution_is_zero_on_average() -> None:
    values = [metrics.kid(features(40, seed=i), features(30, seed=1000 + i)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5
    assert min(values) < 0, "unbiased: half of them fall below zero"


@pytest.mark.parametrize(("n", "m", "d"), [(300, 250, 5), (220, 400, 64), (40, 30, 64)])
def test_frechet_distance_equals_scipys_matrix_root(n: int, m: int, d: int) -> None:
    x, y = features(n, d), features(m, d, seed=1, shift=0.3)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    # With fewer samples than features the product is singular, where sqrtm itself is inexact.
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8 if min(n, m) > d else 1e-3)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_shifted_one_the_squared_shift() -> None:
    x = features(300)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 0.5) == pytest.approx(6 * 0.25, rel=1e-9)


def brute_prdc(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    def radius(points: np.ndarray, i: int) -> float:
        return float(sorted(np.linalg.norm(points[i] - q) for j, q in enumerate(points) if j != i)[k - 1])

    of_real = [radius(real, i) for i in range(len(real))]
    of_fake = [radius(fake, j) for j in range(len(fake))]
    far = [[float(np.linalg.norm(p - q)) for q in fake] for p in real]
    n, m = range(len(real)), range(len(fake))
    return {
        "precision": float(np.mean([any(far[i][j] < of_real[i] for i in n) for j in m])),
        "recall": float(np.mean([any(far[i][j] < of_fake[j] for j in m) for i in n])),
        "density": float(np.mean([sum(far[i][j] < of_real[i] for i in n) for j in m])) / k,
        "coverage": float(np.mean([any(far[i][j] < of_real[i] for j in m) for i in n])),
    }


@settings(max_examples=20, deadline=None)
@given(st.integers(7, 25), st.integers(7, 25), st.floats(-2, 2), st.integers(0, 2**31))
def test_precision_recall_density_coverage_equal_brute_force(n: int, m: int, shift: float, seed: int) -> None:
    real, fake = features(n, 3, seed), features(m, 3, seed + 1, shift)
    assert metrics.prdc(real, fake) == pytest.approx(brute_prdc(real, fake, 5), abs=1e-12)


def test_a_collapsed_generator_has_precision_but_no_recall() -> None:
    real = features(200)
    fake = real[:1] + 1e-3 * features(200, seed=2)
    results = metrics.prdc(real, fake)
    assert results["precision"] > 0.95
    assert results["recall"] < 0.05
    assert results["coverage"] < 0.1


# --- Clipped density and coverage.


def brute_clipped(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Clipped density, and clipped coverage before its calibration."""

    def sorted_distances(p: np.ndarray, points: np.ndarray) -> list[float]:
        return sorted(float(np.linalg.norm(p - q)) for q in points)

    radius = [sorted_distances(p, real)[k] for p in real]  # the first is the point itself
    small = [min(r, float(np.median(radius))) for r in radius]

    def mean_weight(points: np.ndarray, own: bool) -> float:
        weights = []
        for j, q in enumerate(points):
            inside = sum(
                float(np.linalg.norm(p - q)) <= small[i] for i, p in enumerate(real) if not (own and i == j)
            )
            weights.append(min(inside / k, 1.0))
        return float(np.mean(weights))

    density = min(mean_weight(fake, False) / mean_weight(real, True), 1.0)
    counts = [sum(d < radius[i] for d in sorted_distances(p, fake)) for i, p in enumerate(real)]
    return density, float(np.mean([min(count, k) / k for count in counts]))


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 25), st.integers(6, 25), st.floats(-2, 2), st.integers(0, 2**31))
def test_clipped_metrics_equal_brute_force(n: int, m: int, shift: float, seed: int) -> None:
    real, fake = features(n, 3, seed), features(m, 3, seed + 1, shift)
    results = metrics.clipped_density_coverage(real, fake)
    density, covered = brute_clipped(real, fake, 5)
    assert results["clipped_density"] == pytest.approx(density, abs=1e-9)
    expected = metrics._expected_coverage(n, m, 5)
    assert np.interp(results["clipped_coverage"], np.linspace(0, 1, m + 1), expected) == pytest.approx(
        min(covered, expected[-1]), abs=1e-9
    )


def test_expected_coverage_is_what_samples_of_the_law_cover_on_average() -> None:
    n, m, k = 40, 30, 5
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        real, fake = rng.uniform(size=(n, 1)), rng.uniform(size=(m, 1))
        radius = metrics.neighbour_radius(metrics.distances(real, real), k)
        covered.append(np.minimum((abs(real - fake.T) < radius[:, None]).sum(1), k).mean() / k)
    assert metrics._expected_coverage(n, m, k)[-1] == pytest.approx(np.mean(covered), abs=0.01)
    assert metrics._expected_coverage(n, m, k)[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bad", [0.0, 0.25, 0.5, 1.0])
def test_clipped_metrics_are_the_fraction_of_good_samples(bad: float) -> None:
    real, fake = features(400, seed=1), features(400, seed=2)
    fake[: round(bad * 400)] += 100
    results = metrics.clipped_density_coverage(real, fake)
    assert results["clipped_density"] == pytest.approx(1 - bad, abs=0.08)
    assert results["clipped_coverage"] == pytest.approx(1 - bad, abs=0.08)


def test_an_outlier_among_the_real_images_makes_no_sample_good() -> None:
    real = features(200)
    real[0] += 30
    between = np.full((200, 6), 15.0) + 1e-3 * features(200, seed=3)  # on the way to it
    assert metrics.prdc(real, between)["precision"] == 1
    assert metrics.clipped_density_coverage(real, between)["clipped_density"] == 0


# --- Sliced Wasserstein.


def test_sliced_wasserstein_of_a_shift_is_its_square_and_of_a_set_to_itself_zero() -> None:
    x = features(300)
    shift = np.array([0.5, 0, -1, 0, 0, 0.2])
    assert metrics.sliced_wasserstein(x, x[::-1]) == 0
    assert metrics.sliced_wasserstein(x, x + shift, 20_000) == pytest.approx((shift**2).sum(), rel=0.02)
    assert metrics.sliced_wasserstein(x, x + shift) == metrics.sliced_wasserstein(x + shift, x)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (9, 15), (7, 20)])
def test_sliced_wasserstein_of_one_feature_equals_the_optimal_assignment(n: int, m: int) -> None:
    x, y = features(n, 1), features(m, 1, seed=1, shift=0.3)
    copies_x, copies_y = np.repeat(x, m, 0), np.repeat(y, n, 0)  # as many of either, each of equal weight
    cost = (copies_x - copies_y.T) ** 2
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert metrics.sliced_wasserstein(x, y) == pytest.approx(cost[rows, columns].mean(), rel=1e-9)


def test_the_bias_of_sliced_wasserstein_is_about_what_its_docstring_says() -> None:
    rng = np.random.default_rng(0)
    biases = [
        metrics.sliced_wasserstein(rng.normal(size=(120, 32)), rng.normal(size=(80, 32))) for _ in range(20)
    ]
    assert 2 < np.mean(biases) / (32 * (1 / 120 + 1 / 80)) < 4


# --- The reference.


def test_effective_rank_counts_equal_directions() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(500, 12)))[0]
    basis -= basis.mean(0)
    white = np.linalg.qr(basis)[0] * 500**0.5
    white -= white.mean(0)
    assert metrics.describe_reference(white)["effective_rank"] == pytest.approx(12, rel=0.02)
    flat = white * np.r_[np.ones(3), np.zeros(9)]
    assert metrics.describe_reference(flat)["effective_rank"] == pytest.approx(3, rel=0.02)


def test_a_reference_is_described_by_its_medians() -> None:
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    described = metrics.describe_reference(x)
    assert described["n"] == 4 and described["dim"] == 1
    assert described["nearest_median"] == 1.5  # of 1, 1, 2, 4
    assert described["pairwise_median"] == 3.5  # of 1, 2, 3, 4, 6, 7
    assert metrics.describe_reference(np.ones((3, 2)))["effective_rank"] == 1


def test_a_metric_with_too_few_samples_refuses_and_holds_no_number() -> None:
    refused = metrics.Metric.refused("fd", 14)
    assert refused.reason == "fd: n=14, needs 200"
    assert refused.as_json() == {"value": None, "n": 14, "reason": "fd: n=14, needs 200"}
    assert not metrics.enough("fd", 14, 5000)
    assert metrics.enough("fd", 200, 5000)


@pytest.mark.parametrize(("value", "expected"), [(0.123456789, 0.123457), (float("nan"), None), (None, None)])
def test_json_numbers_are_rounded_and_finite(value: float | None, expected: float | None) -> None:
    assert metrics.rounded(value) == expected


def patches(n: int = 12, resolution: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    big = torch.nn.functional.interpolate(coarse, size=(resolution, resolution), mode="nearest")
    return (big * 255).round().to(torch.uint8)


def blurred(images: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(images.float(), [1] * 4, mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 3, 1).round().to(torch.uint8)


def test_sharpness_of_equal_sets_matches_exactly() -> None:
    same = metrics.compare_sharpness(metrics.sharpness(patches()), metrics.sharpness(patches()))
    assert same == pytest.approx({"top_octave": 0, "laplacian": 1, "gradient": 0}, abs=1e-12)


def test_blur_lowers_every_sharpness_and_noise_raises_the_top_octave() -> None:
    images = patches()
    real = metrics.sharpness(images)
    soft = metrics.compare_sharpness(real, metrics.sharpness(blurred(images)))
    noise = torch.randint(0, 40, images.shape, generator=torch.Generator().manual_seed(1))
    harsh = (images.long() + noise).clamp(0, 255).to(torch.uint8)
    noisy = metrics.compare_sharpness(real, metrics.sharpness(harsh))
    assert soft["top_octave"] < -0.5
    assert soft["laplacian"] < 0.6
    assert soft["gradient"] > 1
    assert noisy["top_octave"] > 0


def test_a_sine_has_its_power_in_its_own_octave() -> None:
    x = torch.arange(64, dtype=torch.float64)

    def stripes(cycles: int) -> torch.Tensor:
        wave = (127.5 + 100 * torch.sin(2 * torch.pi * cycles * x / 64)).round().to(torch.uint8)
        return wave.expand(1, 3, 64, 64)

    fine, coarse = (metrics.sharpness(stripes(cycles)).top_octave[0] for cycles in (20, 10))
    # Parseval: the whole variance, spread over the pixels of the octave; rounding to uint8 leaves 1/12.
    f = np.fft.fftfreq(64)
    radius = np.hypot(f[:, None], f[None])
    inside = int(((radius >= 0.25) & (radius < 0.5)).sum())
    assert fine == pytest.approx(100**2 / 2 * 64 * 64 / inside, rel=2e-3)
    assert coarse < 1e-3 * fine
