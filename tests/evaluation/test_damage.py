"""Damage has the strength that it is called with, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.evaluation import damage
from pipeline.evaluation.metrics import log_power_gap, sharpness
from tests.evaluation.test_features import drawings

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "blur": lambda x: damage.blur(x, 1.0),
    "sharpen": lambda x: damage.sharpen(x, 1.0),
    "dither": lambda x: damage.dither(x, 4),
    "add_noise": lambda x: damage.add_noise(x, 12, seed=0),
    "jpeg": lambda x: damage.jpeg(x, 50),
    "shift": lambda x: damage.shift(x, 2),
    "noise_like": lambda x: damage.noise_like(x, seed=0),
}


def mean_change(images: Tensor, other: Tensor) -> float:
    return float((images.float() - other.float()).abs().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resolution", [16, 64])
def test_damage_changes_images_repeatably_and_leaves_the_original_alone(kind: str, resolution: int) -> None:
    images = drawings(3, resolution=resolution)
    before = images.clone()
    damaged = KINDS[kind](images)
    assert damaged.shape == images.shape
    assert damaged.dtype == torch.uint8
    assert mean_change(images, damaged) > 0.1
    assert torch.equal(damaged, KINDS[kind](images))
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", ["blur", "sharpen", "dither", "shift", "jpeg"])
@pytest.mark.parametrize("value", [0, 255])
def test_a_plain_black_or_white_image_survives_all_but_noise(kind: str, value: int) -> None:
    plain = torch.full((1, 3, 32, 32), value, dtype=torch.uint8)
    assert torch.equal(KINDS[kind](plain), plain)


def test_a_blurred_point_has_the_standard_deviation_asked_for() -> None:
    point = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    point[..., 28:37, 28:37] = 255  # 9 px wide: variance (81 - 1) / 12
    profile = damage.blur(point, 3.0)[0, 0].double().sum(0)
    x = torch.arange(65.0) - 32
    variance = (profile * x**2).sum() / profile.sum()
    assert float(variance) == pytest.approx(9 + 80 / 12, rel=0.04)


def test_noise_has_the_standard_deviation_asked_for() -> None:
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    assert float(damage.add_noise(grey, 12, seed=0).float().std()) == pytest.approx(12, rel=0.02)
    assert not torch.equal(damage.add_noise(grey, 12, seed=0), damage.add_noise(grey, 12, seed=1))


@pytest.mark.parametrize("grey", [16, 100, 240])
def test_dither_keeps_the_mean_with_few_values(grey: int) -> None:
    dithered = damage.dither(torch.full((1, 3, 64, 64), grey, dtype=torch.uint8), 2)
    assert set(dithered.unique().tolist()) == {0, 255}
    assert float(dithered.float().mean()) == pytest.approx(grey, abs=255 / 16)


def test_blur_takes_power_from_the_top_octave_and_sharpening_adds_to_it() -> None:
    images = drawings(8)
    power = sharpness(images).top_octave
    assert log_power_gap(power, sharpness(damage.blur(images, 1.0)).top_octave) < -2.5
    assert log_power_gap(power, sharpness(damage.sharpen(images, 1.0)).top_octave) > 0.1


def test_shift_moves_right_and_down_and_back() -> None:
    images = drawings(2)
    moved = damage.shift(images, 3)
    assert torch.equal(moved[..., 3:, 3:], images[..., :-3, :-3])
    assert torch.equal(damage.shift(moved, -3)[..., :-3, :-3], images[..., :-3, :-3])


def test_jpeg_of_low_quality_is_worse() -> None:
    images = drawings(2)
    low, high = (mean_change(images, damage.jpeg(images, quality)) for quality in (10, 90))
    assert low > 2 * high
