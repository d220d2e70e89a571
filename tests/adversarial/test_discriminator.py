"""Frozen features and heads."""

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional

from pipeline.adversarial.discriminator import (
    CoreFeatures,
    Heads,
    Lite0Features,
    Perturbation,
    PixelFeatures,
    load_lite0,
)
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import build_core
from pipeline.models.resample import high_pass
from pipeline.models.statistics import Statistics

STATISTICS = Statistics((0.4, 0.3, 0.2), (0.6, 0.6, 0.6))


def view(n: int, sigma: float = 0.05) -> Perturbation:
    return Perturbation(torch.full((n,), sigma), torch.zeros(n, 3, 16, 16), (0, 0))


def captions(n: int) -> Conditioning:
    return Conditioning(torch.randn(n, 8), torch.randn(n, 3, 8), torch.ones(n, 3, dtype=torch.bool))


def test_statistics_invert() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(STATISTICS.to_uint8(STATISTICS.standardise(images)), images)


def test_gradients_reach_the_images_through_all_features() -> None:
    torch.manual_seed(0)
    net = {"patch": 2, "channels": 16, "channel_mult": [1, 2], "attention": [4]}
    core = build_core(16, 8, net).requires_grad_(False)
    images, text = torch.randn(4, 3, 32, 32, requires_grad=True), captions(4)
    for network in (
        CoreFeatures(core),
        Lite0Features(STATISTICS, torch.randn(8, 3, 32, 32)),
        PixelFeatures(4),
    ):
        heads = Heads(network.channels, 8, 64)
        logits = heads(network(images, text, view(4)), text)
        assert logits.shape == (4,)
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        assert float(gradient.abs().sum()) > 0


def test_the_caption_moves_the_logit() -> None:
    torch.manual_seed(0)
    heads, features = Heads([5], 8, 64), [torch.randn(2, 5, 4, 4)]
    text = captions(2)
    assert not torch.allclose(heads(features, text), heads(features, text._replace(pooled=-text.pooled)))


def test_pixel_features_hold_every_pixel_and_its_high_band_and_follow_the_shift() -> None:
    images = torch.randn(2, 3, 8, 8)
    (plain,) = PixelFeatures(2)(images, captions(2), view(2))
    assert plain.shape == (2, 24, 4, 4)
    both = functional.pixel_shuffle(plain, 2)
    torch.testing.assert_close(both, torch.cat([4 * high_pass(images), images], dim=1))
    (moved,) = PixelFeatures(2)(images, captions(2), view(2)._replace(shift=(2, 4)))
    torch.testing.assert_close(moved, plain.roll((1, 2), dims=(2, 3)))


def test_lite0_features_are_scaled_to_unit_deviation_and_stable_under_batching() -> None:
    reference = torch.randn(8, 3, 32, 32)
    network = Lite0Features(STATISTICS, reference)
    maps = network(reference, captions(8), view(8))
    assert [m.shape[1] for m in maps] == network.channels
    assert [float(m.std()) for m in maps] == pytest.approx([1.0] * 4, rel=1e-3)
    alone = network(reference[:1], captions(1), view(1))
    for one, many in zip(alone, maps, strict=True):
        torch.testing.assert_close(one[0], many[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("picture", "label"), [("flower.jpg", 985), ("china.jpg", 698)])
def test_the_packaged_lite0_still_knows_imagenet(picture: str, label: int) -> None:
    """A photo of a daisy and one of a palace (ImageNet labels 985 and 698), which scikit-learn ships."""
    photo = torch.from_numpy(load_sample_image(picture).copy()).permute(2, 0, 1)[None].float()
    side = min(photo.shape[-2:])
    top, left = ((length - side) // 2 for length in photo.shape[-2:])
    photo = photo[..., top : top + side, left : left + side]
    photo = functional.interpolate(photo, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        assert int(load_lite0()((photo - 127) / 128).argmax()) == label
