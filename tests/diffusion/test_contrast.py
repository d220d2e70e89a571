"""Samples get the contrast of real images, in the range of pixels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.adversarial.few_step import generate_refined
from pipeline.diffusion.contrast import match_contrast, power
from pipeline.diffusion.generate import generate
from pipeline.export.programs import ImageProgram
from pipeline.models.config import SnapshotConfig
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from tests.builders import build_pyramid, captions, snapshot_config

STATISTICS = Statistics((0.2, 0.1, 0.0), (0.5, 0.6, 0.7))


def images(scale: float, count: int = 16) -> Tensor:
    """Standardised normal images of this standard deviation, as uint8: many of them are cut off."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return STATISTICS.to_uint8(scale * noise)


@pytest.mark.parametrize("scale", [0.4, 0.43, 0.44, 0.46])
def test_paler_samples_get_the_power_of_the_real_images(scale: float) -> None:
    samples, real = images(scale), images(0.44)
    factor = match_contrast(samples, real, STATISTICS)
    reached = STATISTICS.standardise(STATISTICS.to_uint8(factor * STATISTICS.standardise(samples)))
    assert power([reached]) == pytest.approx(power([STATISTICS.standardise(real)]), rel=0.005)
    assert factor == pytest.approx(0.44 / scale, rel=0.02)


def test_images_of_several_sizes_count_by_their_pixels() -> None:
    samples, real = images(0.42), images(0.44)
    cut = [*samples[:8], *samples[8:, :, :, :4], *samples[8:, :, :, 4:]]
    assert match_contrast(cut, real, STATISTICS) == pytest.approx(match_contrast(samples, real, STATISTICS))


def test_contrast_that_is_wrong_by_more_than_a_fifth_is_left_as_it_is() -> None:
    assert match_contrast(images(0.2), images(0.44), STATISTICS) == 1.0
    assert match_contrast(images(0.44), images(0.2), STATISTICS) == 1.0


def test_standardised_images_are_clipped_where_pixels_are() -> None:
    wide = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = STATISTICS.clip(wide)
    assert torch.equal(STATISTICS.to_uint8(ours), STATISTICS.to_uint8(wide))
    assert torch.equal(STATISTICS.clip(ours), ours) and not torch.equal(ours, wide)
    inside = STATISTICS.standardise(images(0.1))
    assert torch.equal(STATISTICS.clip(inside), inside)


@pytest.mark.parametrize("kind", ["finetuned", "refined"])
def test_a_model_makes_its_images_at_its_contrast_everywhere_alike(kind: str) -> None:
    denoiser = build_pyramid(8, (0.04,), gain=0.7).requires_grad_(False)
    few = {"passes": (1,), "sigma_start": 5.0} if kind == "refined" else {}
    config = replace(snapshot_config(denoiser, kind, **few), text_encoder={"name": "random", "dim": 8})
    plain = Snapshot(denoiser, config, "")
    vivid = Snapshot(denoiser, SnapshotConfig.from_json({**config.to_json(), "contrast": 1.1}), "")
    assert vivid.config == replace(config, contrast=1.1)
    make = generate_refined if kind == "refined" else generate
    ours, theirs = (make(snapshot, captions(4), range(4)).images for snapshot in (vivid, plain))
    expected = plain.statistics.to_uint8(1.1 * plain.statistics.standardise(theirs))
    assert not torch.equal(ours, theirs)
    assert (ours.int() - expected.int()).abs().max() <= 1, "theirs were rounded before"
    text, program = captions(4), ImageProgram(vivid)
    noise = torch.randn(4, sum(program.sizes), generator=torch.Generator().manual_seed(0))
    drawn = program(*text[:3], noise)
    unscaled = ImageProgram(plain)(*text[:3], noise)
    mean = plain.statistics.to_uint8(torch.zeros(1, 3, 1, 1)).float()
    assert torch.allclose(drawn, (mean + 1.1 * (unscaled - mean)).clamp(0, 255), atol=1.0)
