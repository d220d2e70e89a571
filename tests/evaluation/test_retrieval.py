"""The caption judge finds captions that features describe, and no others."""

import numpy as np
import pytest

from pipeline.evaluation import retrieval


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [n,40] that are a noisy linear image of caption vectors [n,8]."""
    rng = np.random.default_rng([seed, n])
    vectors = rng.normal(size=(n, 8))
    mix = np.random.default_rng(1).normal(size=(8, 40))
    return vectors @ mix + 0.3 * rng.normal(size=(n, 40)), vectors


def test_new_images_retrieve_their_captions_and_noise_does_not() -> None:
    features, vectors = world(150, 0)
    judge = retrieval.Judge.fit(features, vectors, [str(i) for i in range(150)])
    new, truth = world(50, 1)
    candidates = judge.vectors(truth)
    order = np.arange(50)
    hits = retrieval.top_k(judge.predict(new), candidates, order, 1)
    assert hits.value is not None
    assert hits.value > 0.9
    noise = np.random.default_rng(0).normal(size=new.shape)
    lost = retrieval.top_k(judge.predict(noise), candidates, order, 1)
    assert lost.value is not None
    assert lost.value < 0.2


def test_top_5_finds_at_least_as_many_as_top_1() -> None:
    rng = np.random.default_rng(0)
    predicted, candidates = rng.normal(size=(40, 8)), rng.normal(size=(30, 8))
    truth = np.arange(40) % 30
    first, five = (retrieval.top_k(predicted, candidates, truth, k).value for k in (1, 5))
    assert first is not None
    assert five is not None
    assert first <= five


def test_ridge_weights_equal_the_primal_closed_form() -> None:
    features, vectors = world(60, 2)
    judge = retrieval.Judge.fit(features, vectors, [str(i) for i in range(60)])
    x, y = judge.features(features), judge.vectors(vectors)
    primal = np.linalg.solve(x.T @ x + judge.ridge * np.eye(40), x.T @ y)
    np.testing.assert_allclose(judge.weights, primal, rtol=1e-8, atol=1e-12)


def test_real_training_images_are_judged_without_their_family() -> None:
    """Features without information: a judge that had seen the image would still find its caption."""
    rng = np.random.default_rng(0)
    features, vectors = rng.normal(size=(60, 200)), rng.normal(size=(60, 8))
    judge = retrieval.Judge.fit(features, vectors, [str(i // 2) for i in range(60)])
    candidates = judge.vectors(vectors)
    seen = retrieval.top_k(judge.predict(features), candidates, np.arange(60), 1)
    families = [str(i // 2) for i in range(60)]
    unseen = retrieval.top_k(judge.predict(features, families), candidates, np.arange(60), 1)
    assert seen.value is not None
    assert unseen.value is not None
    assert unseen.value < 0.15 < seen.value


def test_a_family_is_judged_by_a_regression_fitted_without_its_fold() -> None:
    """Also in new images of it, such as drawn ones; a family that was not fitted is judged by all."""
    features, vectors = world(60, 4)
    families = [f"family {i // 2}" for i in range(60)]
    judge = retrieval.Judge.fit(features, vectors, families)
    x, y, new = judge.features(features), judge.vectors(vectors), world(6, 5)[0]
    for name in ("family 0", "family 17"):
        kept = np.array([judge.folds[family] != judge.folds[name] for family in families])
        primal = np.linalg.solve(x[kept].T @ x[kept] + judge.ridge * np.eye(40), x[kept].T @ y[kept])
        expected = judge.features(new) @ primal
        np.testing.assert_allclose(judge.predict(new, [name] * 6), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(judge.predict(new, ["another"] * 6), judge.predict(new))


@pytest.mark.parametrize(("n", "candidates"), [(5, 40), (40, 5)])
def test_too_few_images_or_captions_refuse(n: int, candidates: int) -> None:
    metric = retrieval.top_k(np.ones((n, 3)), np.ones((candidates, 3)), np.zeros(n, dtype=np.int64), 1)
    assert metric.reason == "retrieval: n=5, needs 20"


def test_the_rank_is_one_for_the_nearest_caption_and_half_for_shuffled_ones() -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 16))
    own = np.arange(200)
    assert (retrieval.caption_rank(vectors, vectors, own) == 1).all()
    assert (retrieval.caption_rank(-vectors, vectors, own) == 0).all()
    shuffled = retrieval.caption_rank(vectors, vectors, np.random.default_rng(1).permutation(200))
    assert abs(shuffled.mean() - 0.5) < 0.06
    assert (retrieval.caption_rank(vectors[:3], np.ones((5, 16)), np.zeros(3, dtype=np.int64)) == 0.5).all()
