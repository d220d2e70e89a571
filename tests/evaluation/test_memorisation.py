"""Copies are found, also mirrored, shifted and blurred ones, and images that are merely alike are not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation import damage, memorisation
from pipeline.evaluation.memorisation import ALIKE, Neighbours, TrainingImages, thumbnails


def textures(n: int, seed: int = 0, resolution: int = 64) -> Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    big = F.interpolate(coarse, size=(resolution, resolution), mode="bilinear")
    return (big * 255).to(torch.uint8)


TRAIN = textures(20)
FAMILIES = np.arange(20)


def nearest(samples: Tensor, train: Tensor = TRAIN, families: np.ndarray = FAMILIES) -> Neighbours:
    return TrainingImages(train.__getitem__, families).nearest(thumbnails(samples))


def nearest_other_family(images: Tensor, families: np.ndarray) -> Neighbours:
    return TrainingImages(images.__getitem__, families).nearest(thumbnails(images), families)


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
def test_copies_are_found_whatever_was_done_to_them(change: Callable[[Tensor], Tensor]) -> None:
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
    apart = nearest_other_family(twins, families)
    assert (apart.rho > ALIKE).all()
    assert (families[apart.row] != families).all()
    alone = nearest_other_family(TRAIN, FAMILIES)
    np.testing.assert_allclose(apart.d1[:20], alone.d1, rtol=1e-5)
    np.testing.assert_allclose(apart.d2[:20], alone.d2, rtol=1e-5)


def test_searching_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families lie in several chunks; the two nearest ones of any chunk may be one family."""
    train, samples = textures(23, seed=3), torch.cat([textures(6, seed=4), TRAIN[:2]])
    families, left_out = np.arange(23) % 4, np.array([-1, 0, 1, 2, 3, -1, 0, 1])
    training = TrainingImages(train.__getitem__, families)
    whole, by_family = (
        training.nearest(thumbnails(samples), left_out),
        training.by_family(thumbnails(samples)),
    )
    by_family[np.arange(8)[left_out >= 0], left_out[left_out >= 0]] = np.inf
    d1, d2 = memorisation.two_nearest(by_family)
    monkeypatch.setattr(memorisation, "CHUNK", 3)
    parts = training.nearest(thumbnails(samples), left_out)
    assert parts.row.tolist() == whole.row.tolist()
    for found in (whole, parts):
        np.testing.assert_allclose(found.d1, d1, rtol=1e-4)
        np.testing.assert_allclose(found.d2, d2, rtol=1e-4)


@pytest.mark.parametrize("resolution", [8, 16, 32, 128])
def test_copies_are_found_at_any_resolution(resolution: int) -> None:
    train = textures(20, resolution=resolution)
    one = max(resolution // 64, 1)
    for copies in (train, train.flip(-1), damage.shift(train, one)):
        found = nearest(copies, train)
        assert found.row.tolist() == FAMILIES.tolist()
        assert (found.rho < ALIKE).all()


def test_neighbours_of_parts_are_those_of_the_whole() -> None:
    whole = nearest(textures(5, seed=1))
    first, second = whole.split([2, 3])
    assert [*first.row, *second.row] == whole.row.tolist()
    assert [*first.rho, *second.rho] == whole.rho.tolist()


def test_with_a_single_family_nothing_is_nearer_than_the_second() -> None:
    assert (nearest(textures(3, seed=2), TRAIN, np.zeros(20, dtype=np.int64)).rho == 1).all()
