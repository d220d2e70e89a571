"""Copies are found, mirrored ones too, and images that are merely alike are not."""

import numpy as np
import pytest
import torch

from pipeline.evaluation import memorisation


def textures(n: int, seed: int = 0, resolution: int = 64) -> torch.Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    big = torch.nn.functional.interpolate(coarse, size=(resolution, resolution), mode="bilinear")
    return (big * 255).to(torch.uint8)


TRAIN = textures(20)
FAMILIES = [str(i) for i in range(20)]


def test_distances_equal_a_plain_loop_over_images_and_flips() -> None:
    samples = textures(4, seed=1)
    neighbours = memorisation.nearest(samples, TRAIN, FAMILIES)
    small = [torch.nn.functional.avg_pool2d(t.double(), 2) for t in (samples, TRAIN, TRAIN.flip(-1))]
    for i in range(4):
        apart = [
            min(float((small[0][i] - side[j]).square().mean().sqrt()) for side in small[1:])
            for j in range(20)
        ]
        assert neighbours.row[i] == int(np.argmin(apart))
        np.testing.assert_allclose([neighbours.d1[i], neighbours.d2[i]], sorted(apart)[:2], rtol=1e-6)


def test_exact_mirrored_and_slightly_noisy_copies_are_found() -> None:
    noise = torch.randint(-4, 5, TRAIN[:3].shape, generator=torch.Generator().manual_seed(3))
    noisy = (TRAIN[:3].long() + noise).clamp(0, 255).to(torch.uint8)
    for samples in (TRAIN[:3], TRAIN[:3].flip(-1), noisy):
        neighbours = memorisation.nearest(samples, TRAIN, FAMILIES)
        assert neighbours.row.tolist() == [0, 1, 2]
        assert (neighbours.ratio < memorisation.COPY_RATIO).all()


def test_new_images_and_blends_of_two_are_not_copies() -> None:
    blend = ((TRAIN[:10].long() + TRAIN[10:].long()) // 2).to(torch.uint8)
    for samples in (textures(10, seed=9), blend):
        assert (memorisation.nearest(samples, TRAIN, FAMILIES).ratio > memorisation.COPY_RATIO).all()


def test_a_variant_of_the_same_family_does_not_hide_a_copy() -> None:
    """The second distance is to another family: twins of one family would make every ratio 1."""
    twins = torch.cat([TRAIN, TRAIN])
    neighbours = memorisation.nearest(TRAIN[:3], twins, FAMILIES + FAMILIES)
    assert (neighbours.ratio < memorisation.COPY_RATIO).all()


def test_the_fraction_of_copies_is_refused_for_few_samples_and_counted_for_many() -> None:
    few = memorisation.nearest(TRAIN[:3], TRAIN, FAMILIES)
    assert memorisation.copies(few).reason == "copies: n=3, needs 100"
    samples = torch.cat([TRAIN, TRAIN, textures(60, seed=5)])
    many = memorisation.copies(memorisation.nearest(samples, TRAIN, FAMILIES))
    assert (many.value, many.n) == (0.4, 100)


def test_the_copying_score_is_low_for_copies_and_near_zero_for_fresh_images() -> None:
    held_out = memorisation.nearest(textures(60, seed=7), TRAIN, FAMILIES)
    fresh = memorisation.nearest(textures(60, seed=8), TRAIN, FAMILIES)
    copied = memorisation.nearest(TRAIN[torch.arange(60) % 20], TRAIN, FAMILIES)
    assert abs(memorisation.copying_score(fresh, held_out).value or 0) < 3
    assert (memorisation.copying_score(copied, held_out).value or 0) < -8


@pytest.mark.parametrize("ties", [False, True])
def test_the_copying_score_is_the_standardised_number_of_pairs_in_which_the_sample_is_farther(
    ties: bool,
) -> None:
    rng = np.random.default_rng(0)
    distances = rng.integers(0, 30, 130) if ties else rng.random(130)
    samples, held_out = distances[:70].astype(float), distances[70:].astype(float)
    u = sum(float(a > b) + 0.5 * float(a == b) for a in samples for b in held_out)
    z = (u - 70 * 60 / 2) / np.sqrt(70 * 60 * (70 + 60 + 1) / 12)
    score = memorisation.copying_score(neighbours_at(samples), neighbours_at(held_out))
    assert (score.value, score.n) == (pytest.approx(z, rel=1e-12), 60)


def neighbours_at(distances: np.ndarray) -> memorisation.Neighbours:
    return memorisation.Neighbours(np.zeros(len(distances), dtype=np.int64), distances, distances)


def test_a_single_family_is_not_an_error() -> None:
    neighbours = memorisation.nearest(TRAIN[:2], TRAIN[:1], ["only"])
    assert neighbours.row.tolist() == [0, 0]
    assert np.isfinite(neighbours.d2).all()
