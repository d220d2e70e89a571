"""Copies are found, mirrored ones too, and what is merely alike is not called one."""

import numpy as np
import torch

from pipeline.evaluation import memorisation


def pictures(n: int, seed: int = 0, resolution: int = 64) -> torch.Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    big = torch.nn.functional.interpolate(coarse, size=(resolution, resolution), mode="bilinear")
    return (big * 255).to(torch.uint8)


TRAIN = pictures(20)
BASES = [str(i) for i in range(20)]


def test_distances_equal_a_plain_loop_over_images_and_flips() -> None:
    samples = pictures(4, seed=1)
    found = memorisation.nearest(samples, TRAIN, BASES)
    small = [torch.nn.functional.avg_pool2d(t.double(), 2) for t in (samples, TRAIN, TRAIN.flip(-1))]
    for i in range(4):
        apart = [
            min(float((small[0][i] - side[j]).square().mean().sqrt()) for side in small[1:])
            for j in range(20)
        ]
        assert found.row[i] == int(np.argmin(apart))
        np.testing.assert_allclose([found.d1[i], found.d2[i]], sorted(apart)[:2], rtol=1e-6)


def test_exact_mirrored_and_slightly_noisy_copies_are_found() -> None:
    noise = torch.randint(-4, 5, TRAIN[:3].shape, generator=torch.Generator().manual_seed(3))
    noisy = (TRAIN[:3].long() + noise).clamp(0, 255).to(torch.uint8)
    for samples in (TRAIN[:3], TRAIN[:3].flip(-1), noisy):
        found = memorisation.nearest(samples, TRAIN, BASES)
        assert found.row.tolist() == [0, 1, 2]
        assert (found.ratio < memorisation.COPY_RATIO).all()


def test_new_pictures_and_blends_of_two_are_no_copies() -> None:
    blend = ((TRAIN[:10].long() + TRAIN[10:].long()) // 2).to(torch.uint8)
    for samples in (pictures(10, seed=9), blend):
        assert (memorisation.nearest(samples, TRAIN, BASES).ratio > memorisation.COPY_RATIO).all()


def test_a_variant_of_the_same_base_does_not_hide_a_copy() -> None:
    """The second distance is that of another base: twins of one base would make every ratio 1."""
    twins = torch.cat([TRAIN, TRAIN])
    found = memorisation.nearest(TRAIN[:3], twins, BASES + BASES)
    assert (found.ratio < memorisation.COPY_RATIO).all()


def test_the_share_of_copies_is_refused_for_few_samples_and_counted_for_many() -> None:
    few = memorisation.nearest(TRAIN[:3], TRAIN, BASES)
    assert memorisation.copies(few).reason == "copies: n=3, needs 100"
    samples = torch.cat([TRAIN, TRAIN, pictures(60, seed=5)])
    many = memorisation.copies(memorisation.nearest(samples, TRAIN, BASES))
    assert (many.value, many.n) == (0.4, 100)


def test_the_copying_score_is_low_for_copies_and_near_zero_for_fresh_pictures() -> None:
    held_out = memorisation.nearest(pictures(60, seed=7), TRAIN, BASES)
    fresh = memorisation.nearest(pictures(60, seed=8), TRAIN, BASES)
    copied = memorisation.nearest(TRAIN[torch.arange(60) % 20], TRAIN, BASES)
    assert abs(memorisation.copying_score(fresh, held_out).value or 0) < 3
    assert (memorisation.copying_score(copied, held_out).value or 0) < -8


def test_one_base_alone_is_no_error() -> None:
    found = memorisation.nearest(TRAIN[:2], TRAIN[:1], ["only"])
    assert found.row.tolist() == [0, 0]
    assert np.isfinite(found.d2).all()
