"""Degradations of what is to be upscaled: each picture its own, all from the generator."""

import pytest
import torch

from pipeline.data.degrade import Degrade, degrade


def noisy_pictures(n: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)


def made(strengths: Degrade, seed: int = 0) -> torch.Tensor:
    return degrade(noisy_pictures(), strengths, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strengths", [Degrade((10, 90), 0.0), Degrade((), 1.5), Degrade((10, 90), 1.5)])
def test_pictures_get_worse_each_by_its_own_draw(strengths: Degrade) -> None:
    images = noisy_pictures()
    worse = made(strengths)
    assert worse.dtype == torch.uint8 and worse.shape == images.shape
    errors = (worse.float() - images.float()).square().mean(dim=(1, 2, 3))
    assert len(set(errors.tolist())) >= 4 and float(errors.max()) > 100
    assert torch.equal(worse, made(strengths)) and not torch.equal(worse, made(strengths, seed=1))


def test_no_strength_changes_nothing() -> None:
    assert torch.equal(made(Degrade((), 0.0)), noisy_pictures())
    assert degrade(noisy_pictures(0), Degrade((30, 30), 1.0), torch.Generator()).shape == (0, 3, 32, 32)


def test_quality_and_blur_do_what_they_say() -> None:
    def error(strengths: Degrade) -> float:
        return float((made(strengths).float() - noisy_pictures().float()).square().mean())

    assert error(Degrade((95, 95), 0)) < error(Degrade((20, 20), 0))
    assert error(Degrade((), 0.5)) < error(Degrade((), 3.0))
