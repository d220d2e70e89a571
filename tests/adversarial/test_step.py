"""What the student is trained on: its starts, and the error to the paired real image, which anchors it."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pipeline.adversarial.discriminator import Heads, PixelFeatures
from pipeline.adversarial.few_step import pure_start
from pipeline.adversarial.step import AdversarialSettings, AdversarialStep, PairedBatch, phase_error
from pipeline.data.dataset import Batch
from pipeline.models.resample import pool
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for
from tests.builders import build_pyramid, captions

SETTINGS = AdversarialSettings(
    seed=0,
    batch_size=4,
    shards=1,
    num_images=4,
    lr=0.0,
    warmup_images=0,
    discriminator_lr=0.0,
    anchor=4.0,
    marginals=4.0,
    noise_starts=0.0,
    penalty_weight=0.01,
    penalty_std=0.02,
    penalty_interval=4,
    sigma_start=5.0,
    passes=(2,),
    pass_probs=(1.0,),
)


@dataclass
class Fixed:
    """Batches that are always the same."""

    images: Tensor  # uint8 [n,3,R,R]

    def at(self, nimg: int, shard: int) -> Batch:
        return Batch(self.images, 1, captions(len(self.images)), None)


def pair(images: Tensor, noise_starts: float) -> PairedBatch:
    """One shard of `images`, which a network of random weights imitates."""
    student = build_pyramid(8)
    frozen = [PixelFeatures(2)]
    heads = Heads(frozen[0].channels, 8)
    settings = replace(SETTINGS, noise_starts=noise_starts)
    step = AdversarialStep(
        student, heads, list(frozen), Fixed(images), Statistics((0.0,) * 3, (0.5,) * 3), settings
    )
    return step.pair(0, 0, passes=2)


def test_a_start_from_noise_shows_nothing_of_the_real_image_and_is_not_anchored_to_it() -> None:
    generator = generator_for(0, "images")
    one, other = torch.randint(0, 256, (2, 4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for share, partners in ((0.0, 4), (0.25, 3), (1.0, 0)):
        a, b = pair(one, share), pair(other, share)
        same = [torch.equal(x, y) for x, y in zip(a.fake, b.fake, strict=True)]
        assert same == [False] * partners + [True] * (4 - partners)
        wanted = phase_error(a.fake[:partners], a.real[:partners], 8) * partners / 4
        assert torch.equal(a.anchor, wanted) and (bool(a.anchor.detach() > 0)) == (partners > 0)
        assert a.marginals > 0


def test_noise_alone_has_the_variance_of_noisy_images() -> None:
    noise = torch.randn(4, 3, 64, 64, generator=generator_for(0, "noise"))
    assert float(pure_start(noise, 0.5).var()) == pytest.approx(0.5, rel=0.02)


def test_the_anchor_sees_a_dither_that_pooling_hides_and_leaves_edges_their_place() -> None:
    real = torch.zeros(1, 3, 16, 16)
    real[..., 6:10] = 1
    dither = 0.2 * (1 - 2 * (torch.arange(16) % 2)).expand_as(real)
    assert pool(dither).abs().max() < 1e-7
    assert phase_error(real + dither, real, 8) == pytest.approx(0.04, rel=1e-5)
    moved = real.roll(1, dims=3)
    assert phase_error(moved, real, 8) < 0.6 * (moved - real).square().mean()
    noise = torch.randn(real.shape, generator=generator_for(0, "noise"))
    assert phase_error(noise, real, 16) == (pool(noise) - pool(real)).square().mean()
