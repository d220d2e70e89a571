"""Augmentation: a function of (seed, epoch, row), told in labels, exact where nothing happens."""

import math

import numpy as np
import pytest
import torch

from pipeline.data.augment import DRAWS, LABELS, Augment, Transforms, apply, draw, uniforms

ALL = Augment(probability=0.5, mirror=True, scale=0.2, rotate=30.0, shift=0.1, hue=180.0)
ROWS, EPOCHS = np.arange(4000), np.full(4000, 3)


def only(**changes: float) -> Transforms:
    zero = {name: np.zeros(1) for name in Transforms._fields}
    return Transforms(**{**zero, **{name: np.array([value]) for name, value in changes.items()}})


def test_numbers_are_uniform_and_independent() -> None:
    u = uniforms(0, EPOCHS, ROWS, DRAWS)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts, _ = np.histogram(column, 20, (0, 1))
        assert ((counts - 200) ** 2 / 200).sum() < 43.8, "chi-squared with 19 degrees of freedom, p = 0.001"
    correlation = np.corrcoef(u.T) - np.eye(DRAWS)
    assert np.abs(correlation).max() < 0.06
    assert np.abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.06


def test_a_picture_is_changed_alike_in_any_batch_and_otherwise_in_another_epoch() -> None:
    some = np.array([70, 3, 1999])
    for field, part in zip(draw(ALL, 0, EPOCHS, ROWS), draw(ALL, 0, EPOCHS[:3], some), strict=True):
        assert np.array_equal(field[some], part)
    other = draw(ALL, 0, EPOCHS + 1, ROWS)
    assert not np.array_equal(other.angle, draw(ALL, 0, EPOCHS, ROWS).angle)
    assert not np.array_equal(other.angle, draw(ALL, 1, EPOCHS + 1, ROWS).angle)


def test_strengths_and_chances_are_those_asked_for() -> None:
    drawn = draw(ALL, 0, EPOCHS, ROWS)
    for name in ("log_scale", "angle", "shift_x", "hue"):
        assert np.mean(getattr(drawn, name) != 0) == pytest.approx(0.5, abs=0.03), name
    assert drawn.mirror.mean() == pytest.approx(0.5, abs=0.03)
    assert drawn.log_scale[drawn.log_scale != 0].std() == pytest.approx(0.2, rel=0.06)
    assert np.abs(drawn.angle).max() <= math.radians(30)
    assert np.abs(drawn.hue).max() > 3
    off = draw(ALL._replace(probability=0.0), 0, EPOCHS, ROWS)
    assert all((field == 0).all() for field in off)


def test_labels_are_zero_exactly_where_nothing_happens() -> None:
    drawn = draw(ALL, 0, EPOCHS, ROWS)
    labels = drawn.labels()
    assert labels.shape == (4000, LABELS) and labels.dtype == torch.float32
    nothing = np.all([field == 0 for field in drawn], axis=0)
    assert torch.equal((labels == 0).all(1), torch.from_numpy(nothing))
    assert nothing.any()


def test_a_picture_to_which_nothing_happens_keeps_its_bits() -> None:
    images = torch.rand(64, 3, 16, 16) * 255
    drawn = draw(ALL, 0, EPOCHS[:64], ROWS[:64])
    still = torch.from_numpy(np.all([field == 0 for field in drawn], axis=0))
    assert torch.equal(apply(images.clone(), drawn)[still], images[still])


def test_each_change_does_what_its_name_says() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0, 4:8, 8:12] = 255  # a red square right of the middle, above it
    assert torch.equal(apply(images.clone(), only(mirror=1)), images.flip(-1))
    moved = apply(images.clone(), only(shift_x=2 / 16, shift_y=4 / 16))
    torch.testing.assert_close(moved, images.roll((4, 2), (2, 3)), atol=1e-2, rtol=0)
    turned = apply(images.clone(), only(angle=math.pi / 2))
    torch.testing.assert_close(turned, images.rot90(-1, (2, 3)), atol=1e-2, rtol=0)
    larger = apply(images.clone(), only(log_scale=0.5))
    assert float(larger.sum()) == pytest.approx(2 * float(images.sum()), rel=0.05)


def test_hue_turns_colours_and_leaves_greys() -> None:
    grey = torch.full((1, 3, 4, 4), 90.0)
    torch.testing.assert_close(apply(grey.clone(), only(hue=2.0)), grey, atol=1e-3, rtol=0)
    red = torch.tensor([255.0, 0, 0])[None, :, None, None].expand(1, 3, 4, 4)
    third = apply(red.clone(), only(hue=2 * math.pi / 3))[0, :, 0, 0]
    assert third.argmax() != 0
    full = apply(red.clone(), only(hue=2 * math.pi))
    torch.testing.assert_close(full, red, atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_what_is_round_stays_round_when_turned_in_any_shape_of_image(size: tuple[int, int]) -> None:
    y, x = (torch.arange(side) - (side - 1) / 2 for side in size)
    disc = (255 * torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / 25)).expand(1, 3, *size)
    turned = apply(disc.clone(), only(angle=math.radians(50)))
    torch.testing.assert_close(turned, disc, atol=6.0, rtol=0)
