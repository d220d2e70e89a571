"""What the student is trained on: its starts, and the error to the paired real image, which anchors it."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pipeline.adversarial.discriminator import Heads, PixelFeatures
from pipeline.adversarial.few_step import pure_start
from pipeline.adversarial.guards import Guards, GuardSettings, guard_tensors, told_apart
from pipeline.adversarial.step import (
    AdversarialSettings,
    AdversarialStep,
    GuardState,
    PairedBatch,
    phase_error,
)
from pipeline.data.dataset import Batch
from pipeline.errors import StorageError
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import pool
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for
from pipeline.training.faults import skipped
from pipeline.training.state import Learner, TrainState
from tests.builders import build_pyramid, captions, no_text

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


def step_of(images: Tensor, settings: AdversarialSettings) -> AdversarialStep:
    """A network of random weights that imitates `images`."""
    student = build_pyramid(8)
    frozen = [PixelFeatures(2)]
    heads = Heads(frozen[0].channels, 8, 64)
    statistics = Statistics((0.0,) * 3, (0.5,) * 3)
    return AdversarialStep(student, heads, list(frozen), Fixed(images), statistics, settings)


def pair(images: Tensor, noise_starts: float) -> PairedBatch:
    """One shard of `images`."""
    return step_of(images, replace(SETTINGS, noise_starts=noise_starts)).pair(0, 0, passes=2)


def test_a_start_from_noise_shows_nothing_of_the_real_image_and_is_not_anchored_to_it() -> None:
    generator = generator_for(0, "images")
    one, other = torch.randint(0, 256, (2, 4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for share, partners in ((0.0, 4), (0.25, 3), (1.0, 0)):
        a, b = pair(one, share), pair(other, share)
        same = [torch.equal(x, y) for x, y in zip(a.fake, b.fake, strict=True)]
        assert same == [False] * partners + [True] * (4 - partners)
        wanted = phase_error(a.fake[:partners], a.real[:partners], 2) * partners / 4
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
    assert phase_error(real + dither, real, 2) == pytest.approx(0.04, rel=1e-5)
    moved = real.roll(1, dims=3)
    assert phase_error(moved, real, 2) < 0.6 * (moved - real).square().mean()
    noise = torch.randn(real.shape, generator=generator_for(0, "noise"))
    assert phase_error(noise, real, 1) == (pool(noise) - pool(real)).square().mean()


@pytest.mark.parametrize("culprit", ["discriminator_loss", "generator_loss"])
def test_what_is_not_finite_moves_neither_the_generator_nor_who_has_made_it(
    culprit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator_for(0, "images"), dtype=torch.uint8)
    step = step_of(images, replace(SETTINGS, lr=0.01, discriminator_lr=0.01))
    generator = Learner(step.student, (0.0, 0.99), {"ema": lambda nimg, batch: 0.9})
    learners = {"generator": generator, "discriminator": Learner(step.heads, (0.0, 0.99))}
    state = TrainState(learners, extra=guard_tensors(generator))

    def moved() -> list[str]:
        before = {name: own.moments["step"].clone() for name, own in learners.items()}
        metrics = {name: float(value) for name, value in step(state).items()}
        assert all(torch.isfinite(tensor).all() for tensor in state.tensors().values())
        names = [name for name, own in learners.items() if own.moments["step"] != before[name]]
        assert skipped(metrics) == (names != list(learners))
        return names

    assert moved() == ["generator", "discriminator"]
    with monkeypatch.context() as patch:
        patch.setattr(
            f"pipeline.adversarial.step.{culprit}", lambda real, fake: (real - fake).mean() * math.nan
        )
        assert moved() == (["discriminator"] if culprit == "generator_loss" else [])
    assert moved() == ["generator", "discriminator"]


def test_a_distance_that_is_not_finite_is_a_bad_state_and_is_not_remembered() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator_for(0, "images"), dtype=torch.uint8)
    step = step_of(images, SETTINGS)
    generator = Learner(step.student, (0.0, 0.99), {"ema": lambda nimg, batch: 0.9})
    state = TrainState({"generator": generator}, extra=guard_tensors(generator))
    distances = [1.0, math.nan]
    limits = GuardSettings(min_spread=0.0, max_caption_error=10.0)
    real = step.statistics.standardise(images.float())
    guards = Guards(step, real, captions(4), limits, lambda samples: distances[state.nimg])
    guards(state)
    best = state.extra["best"].clone()
    generator.emas["ema"].add_(1.0)
    state.nimg = 1
    assert math.isnan(guards(state)["score"]) and state.extra["guard"].isfinite().all()
    assert GuardState.load(state).rollbacks == 1 and torch.equal(generator.emas["ema"], best)
    state.nimg = 0
    distances[0] = math.inf
    with pytest.raises(StorageError, match="the model to refine: score is inf, which is not finite"):
        guards(state)


@pytest.mark.parametrize("text", [no_text(4), captions(4).select(torch.zeros(4, dtype=torch.long))])
def test_where_captions_tell_no_images_apart_there_is_no_caption_error(text: Conditioning) -> None:
    """One-pass samples, which may be any image, would else always be further from the real one than their mean."""
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator_for(0, "images"), dtype=torch.uint8)
    step = step_of(images, SETTINGS)
    generator = Learner(step.student, (0.0, 0.99), {"ema": lambda nimg, batch: 0.9})
    real = step.statistics.standardise(images.float())
    guards = Guards(step, real, text, GuardSettings(min_spread=0.0, max_caption_error=1.3))
    assert guards.measure(generator, generator.emas["ema"])[2] == 0
    some = captions(4)._replace(mask=torch.tensor([[True], [True], [False], [False]]).expand(4, 3))
    assert told_apart(some).tolist() == [True, True, False, False]
