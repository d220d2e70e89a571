"""Copies are found, also mirrored, shifted and blurred ones, and images that are merely alike are not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation import damage, memorisation
from pipeline.evaluation.memorisation import ALIKE, Neighbours, TrainingImages


def textures(n: int, seed: int = 0, resolution: int = 64) -> Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    big = F.interpolate(coarse, size=(resolution, resolution), mode="bilinear")
    return (big * 255).to(torch.uint8)


TRAIN = textures(20)
FAMILIES = np.arange(20)


def nearest(samples: Tensor, train: Tensor = TRAIN, families: np.ndarray = FAMILIES) -> Neighbours:
    return TrainingImages(train, families).nearest(samples)


def moved(images: Tensor, dy: int, dx: int) -> Tensor:
    """Shifted by whole pixels, the edge repeated, by indexing."""
    R = images.shape[-1]
    rows, columns = (torch.arange(R) + dy).clamp(0, R - 1), (torch.arange(R) + dx).clamp(0, R - 1)
    return images[:, :, rows][..., columns]


def test_distances_equal_a_plain_loop_over_mirrored_shifted_and_blurred_images() -> None:
    samples = textures(4, seed=1)
    neighbours = nearest(samples)
    variants = []
    for side in (TRAIN, TRAIN.flip(-1)):
        variants += [moved(side, y, x) for y, x in memorisation.SHIFTS]
        variants += [damage.blur(side, sigma) for sigma in memorisation.BLURS]
    small = F.avg_pool2d(samples.double(), 4)
    pooled = [F.avg_pool2d(variant.double(), 4) for variant in variants]
    for i in range(4):
        apart = [
            min(float((small[i] - variant[j]).square().mean().sqrt()) for variant in pooled)
            for j in range(20)
        ]
        assert neighbours.row[i] == int(np.argmin(apart))
        np.testing.assert_allclose([neighbours.d1[i], neighbours.d2[i]], sorted(apart)[:2], rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images,
        lambda images: images.flip(-1),
        lambda images: damage.add_noise(images, 8, seed=3),
        lambda images: damage.blur(images, 1.0),
        lambda images: damage.blur(images, 2.0),
        lambda images: damage.shift(images, 1),
        lambda images: moved(images, -2, 0),
        lambda images: moved(images.flip(-1), 0, 2),
        lambda images: damage.dither(images, 8),
    ],
)
def test_copies_are_found_whatever_was_done_to_them(change) -> None:  # type: ignore[no-untyped-def]
    neighbours = nearest(change(TRAIN))
    assert neighbours.row.tolist() == FAMILIES.tolist()
    assert (neighbours.rho < ALIKE).all()


def test_new_images_and_blends_of_two_are_not_copies() -> None:
    blend = ((TRAIN[:10].long() + TRAIN[10:].long()) // 2).to(torch.uint8)
    for samples in (textures(10, seed=9), blend):
        assert (nearest(samples).rho > ALIKE).all()


def test_a_variant_of_the_same_family_does_not_hide_a_copy() -> None:
    """The second distance is to another family: twins of one family would make every ratio 1."""
    twins = torch.cat([TRAIN, TRAIN])
    neighbours = nearest(TRAIN[:3], twins, np.concatenate([FAMILIES, FAMILIES]))
    assert (neighbours.rho < ALIKE).all()


def test_a_training_image_is_compared_with_other_families_only() -> None:
    twins, families = torch.cat([TRAIN, TRAIN]), np.concatenate([FAMILIES, FAMILIES])
    apart = TrainingImages(twins, families).nearest_other_family(twins)
    assert (apart.rho > ALIKE).all()
    assert (families[apart.row] != families).all()
    alone = TrainingImages(TRAIN, FAMILIES).nearest_other_family(TRAIN)
    np.testing.assert_allclose(apart.d1[:20], alone.d1, rtol=1e-5)
    np.testing.assert_allclose(apart.d2[:20], alone.d2, rtol=1e-5)


def test_with_a_single_family_nothing_is_nearer_than_the_second() -> None:
    assert (nearest(textures(3, seed=2), TRAIN, np.zeros(20, dtype=np.int64)).rho == 1).all()
