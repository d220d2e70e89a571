"""One update of adversarial refinement: the discriminator heads, then the few-pass generator (the student).

The student makes images in one, two or four passes. Heads on frozen features distinguish them from real images with
the same captions (losses.py). An anchor, the error to the paired real image, preserves captions, variety and
everything that the features cannot see. A distance of marginal distributions corrects contrast, sharpness and
grain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adversarial.discriminator import FrozenFeatures, Heads, Perturbation
from pipeline.adversarial.few_step import few_step, pure_start
from pipeline.adversarial.losses import (
    difference_penalty,
    discriminator_loss,
    generator_loss,
    marginal_distance,
)
from pipeline.data.dataset import BatchSource
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, pyramid_levels
from pipeline.models.resample import pool, rescale
from pipeline.models.shape import Shape
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for
from pipeline.training.distributed import local_shards, sum_over_shards
from pipeline.training.gradients import GradientSum
from pipeline.training.hooks import failpoint
from pipeline.training.schedule import StepSettings, linear_decay_lr
from pipeline.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(StepSettings):
    """Settings of an adversarial step; `lr` is the generator's.

    anchor: weight of the error to the paired real image, where the start shows it. marginals: weight of the
    distance of marginal distributions. noise_starts: fraction of a shard's images that start from noise alone.
    penalty_weight, penalty_std: lambda s^2 and s of the finite-difference penalties, applied every
    `penalty_interval` updates. sigma_start: noise level at which the core starts. passes: numbers of passes that
    are trained, drawn with pass_probs."""

    discriminator_lr: float
    anchor: float
    marginals: float
    noise_starts: float
    penalty_weight: float
    penalty_std: float
    penalty_interval: int
    sigma_start: float
    passes: tuple[int, ...]
    pass_probs: tuple[float, ...]


class GuardState(NamedTuple):
    """What the guards (guards.py) remember; in the training state one float64 tensor [8], extra["guard"]."""

    lr_scale: float = 1.0  # halved at every rollback
    rollbacks: float = 0.0
    best_score: float = 0.0
    best_nimg: float = 0.0
    base_error: float = 0.0  # caption error before refinement
    spread: float = 0.0  # at the last check, as the two below
    caption_error: float = 0.0
    score: float = 0.0

    @classmethod
    def load(cls, state: TrainState) -> "GuardState":
        """Read from a training state."""
        return cls(*state.extra["guard"].tolist())

    def store(self, state: TrainState) -> None:
        """Write to a training state."""
        state.extra["guard"].copy_(self.tensor())

    def tensor(self) -> Tensor:
        """As it is stored."""
        return torch.tensor(self, dtype=torch.float64)


class PairedBatch(NamedTuple):
    """One shard of fake images and their real partners, with their frozen features."""

    text: Conditioning
    perturbation: Perturbation
    real: Tensor  # [B,3,H,W]
    fake: Tensor  # [B,3,H,W], with graph
    fake_features: list[Tensor]  # with graph
    real_features: list[Tensor]
    anchor: Tensor  # scalar, with graph
    marginals: Tensor  # scalar, with graph


def phase_error(fake: Tensor, real: Tensor, fold: int) -> Tensor:
    """Mean squared error of [B,3,H,W] at half the core's resolution, of every phase of its grid on its own; `fold`
    px of an image are one of the core.

    A pooled error alone is blind to a pattern that repeats within a pixel of the core, as are discriminators on
    pooled images; the optimiser then drifts into a dither. A phase, which is every `fold`-th pixel, sees
    such a pattern as an offset, while the exact position of an edge within its neighbourhood remains free.
    Without images it is 0."""
    if not len(real):
        return real.new_zeros(())
    return pool(F.pixel_unshuffle(fake - real, fold)).square().mean()


@dataclass
class AdversarialStep:
    """Discriminator update, then generator update, from one generator pass."""

    student: Denoiser
    heads: Heads
    frozen: list[FrozenFeatures]
    batches: BatchSource
    statistics: Statistics
    settings: AdversarialSettings

    def draw_passes(self, nimg: int) -> int:
        """Number of passes of this batch, the same on every worker."""
        generator = generator_for(self.settings.seed, "passes", nimg)
        choice = torch.multinomial(torch.tensor(self.settings.pass_probs), 1, generator=generator)
        return self.settings.passes[int(choice)]

    def features(self, images: Tensor, text: Conditioning, perturbation: Perturbation) -> list[Tensor]:
        """Feature maps of all frozen networks."""
        return [f for network in self.frozen for f in network(images, text, perturbation)]

    def pair(self, nimg: int, shard: int, passes: int) -> PairedBatch:
        """Generate the fake images of one shard; features of them and of their real partners."""
        s, device = self.settings, next(self.student.parameters()).device
        images, text = self.batches.at(nimg, shard).to(device)
        real = rescale(self.statistics.standardise(images), self.student.resolution)
        generator = generator_for(s.seed, "adversarial", nimg, shard, device)
        core_resolution = pyramid_levels(self.student)[0].resolution
        fold, shape = self.student.resolution // core_resolution, Shape.of(real, self.student.resolution)

        def normal(resolution: int) -> Tensor:
            size = (len(real), 3, *shape.at(resolution))
            return torch.randn(size, generator=generator, device=device)

        def draw(purpose: str, resolution: int) -> Tensor:
            return normal(resolution)

        # Some see their real partner through the noise, and are held to it. The others start as sampling does.
        partners = len(real) - round(s.noise_starts * len(real))
        noise = normal(core_resolution)
        seen = rescale(real[:partners], core_resolution) + s.sigma_start * noise[:partners]
        start = torch.cat([seen, pure_start(noise[partners:], s.sigma_start)])
        fake = few_step(self.student, text, draw, passes, s.sigma_start, start)[-1]
        perturbation = Perturbation(
            sigma=(torch.randn(len(real), generator=generator, device=device) - 2).exp(),
            noise=normal(core_resolution),
            shift=self.draw_shift(generator, self.student.resolution),
        )
        with torch.no_grad():
            real_features = self.features(real, text, perturbation)
        # In this order, which is that of the sums in the backward pass.
        anchor = phase_error(fake[:partners], real[:partners], fold)
        anchor = anchor * (partners / len(real))
        marginals = marginal_distance(fake, real)
        fake_features = self.features(fake, text, perturbation)
        return PairedBatch(text, perturbation, real, fake, fake_features, real_features, anchor, marginals)

    @staticmethod
    def draw_shift(generator: torch.Generator, resolution: int) -> tuple[int, int]:
        """Translation by up to an eighth of the image in each direction."""
        limit, device = resolution // 8, generator.device
        dy, dx = torch.randint(-limit, limit + 1, (2,), generator=generator, device=device).tolist()
        return dy, dx

    def penalties(self, pair: PairedBatch, real: Tensor, fake: Tensor, nimg: int, shard: int) -> Tensor:
        """Finite-difference R1 + R2, given the logits `real` and `fake` of the pair."""
        s, device = self.settings, pair.real.device
        generator = generator_for(s.seed, "penalty", nimg, shard, device)
        noise = s.penalty_std * torch.randn(pair.real.shape, generator=generator, device=device)
        total = torch.zeros((), device=device)
        for images, logits in ((pair.real, real), (pair.fake.detach(), fake)):
            with torch.no_grad():
                features = self.features(images + noise, pair.text, pair.perturbation)
            perturbed = self.heads(features, pair.text)
            total = total + difference_penalty(logits, perturbed, s.penalty_weight, s.penalty_std)
        return total * s.penalty_interval

    def __call__(self, state: TrainState) -> dict[str, Tensor]:
        """One update of both; returns metrics averaged over the batch.

        Where the gradient of the discriminator is not finite, both updates are skipped; where that of the generator
        is not, its own."""
        s, nimg = self.settings, state.nimg
        passes = self.draw_passes(nimg)
        pairs = {shard: self.pair(nimg, shard, passes) for shard in local_shards(s.shards)}
        scale = GuardState.load(state).lr_scale * linear_decay_lr(1.0, nimg, s.num_images, s.warmup_images)
        d_losses, d_norm = self.update_discriminator(state, pairs, s.discriminator_lr * scale)
        failpoint("discriminator", nimg)
        g_losses, norm = self.update_generator(state, list(pairs.values()), s.lr * scale, d_norm)
        own = [torch.cat([d, g]) for d, g in zip(d_losses, g_losses, strict=True)]
        totals = sum_over_shards(own) / s.shards
        names = ("discriminator_loss", "margin", "generator_loss", "anchor", "marginals")
        norms = {"discriminator_gradient_norm": d_norm, "generator_gradient_norm": norm}
        return dict(zip(names, totals.unbind(), strict=True)) | norms

    def update_discriminator(
        self, state: TrainState, pairs: dict[int, PairedBatch], lr: float
    ) -> tuple[list[Tensor], Tensor]:
        """Train the heads on pairs by shard; of each shard the loss and the mean of D(real) - D(fake), and the norm
        of the gradient."""
        s, learner = self.settings, state.learners["discriminator"]
        penalise = (state.nimg // s.batch_size) % s.penalty_interval == 0
        gradients, losses = GradientSum([learner]), []
        self.heads.requires_grad_(True)
        for shard, pair in pairs.items():
            gradients.begin_shard()
            losses.append(self.add_discriminator_gradient(pair, state.nimg, shard, penalise))
        gradients.finish()
        learner.grad.div_(s.shards)
        return losses, learner.update(lr, state.nimg, s.batch_size)

    def update_generator(
        self, state: TrainState, pairs: Sequence[PairedBatch], lr: float, d_norm: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Train the student through the heads, whose own update had a gradient of norm `d_norm`; of each shard the
        adversarial loss, the anchor and the distance of marginals, and the norm of the gradient."""
        s, learner = self.settings, state.learners["generator"]
        gradients, losses = GradientSum([learner]), []
        self.heads.requires_grad_(False)
        for pair in pairs:
            gradients.begin_shard()
            losses.append(self.add_generator_gradient(pair))
        gradients.finish()
        learner.grad.div_(s.shards)
        return losses, learner.update(lr, state.nimg, s.batch_size, d_norm)

    def add_discriminator_gradient(self, pair: PairedBatch, nimg: int, shard: int, penalise: bool) -> Tensor:
        """Add one shard's gradient to the heads'; returns the loss and the mean of D(real) - D(fake) [2]."""
        real = self.heads(pair.real_features, pair.text)
        fake = self.heads([f.detach() for f in pair.fake_features], pair.text)
        loss = discriminator_loss(real, fake)
        penalty = self.penalties(pair, real, fake, nimg, shard) if penalise else loss.new_zeros(())
        (loss + penalty).backward()
        return torch.stack([loss, (real - fake).mean()]).detach()

    def add_generator_gradient(self, pair: PairedBatch) -> Tensor:
        """Add one shard's gradient to the student's, through heads that do not learn; returns the loss, the anchor
        and the distance of marginals [3]."""
        s = self.settings
        with torch.no_grad():
            real = self.heads(pair.real_features, pair.text)
        loss = generator_loss(real, self.heads(pair.fake_features, pair.text))
        (loss + s.anchor * pair.anchor + s.marginals * pair.marginals).backward()
        return torch.stack([loss, pair.anchor, pair.marginals]).detach()
