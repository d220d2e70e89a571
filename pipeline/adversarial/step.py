"""One update of adversarial refinement, and the guards that keep its best state.

The student makes images in one, two or four passes; heads on frozen features tell them from real images with
the same captions. An anchor to the paired real image keeps captions, variety and what the features cannot see.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adversarial.discriminator import FrozenFeatures, Heads, Perturbation
from pipeline.adversarial.few_step import few_step
from pipeline.adversarial.losses import difference_penalty, discriminator_loss, generator_loss
from pipeline.data.dataset import Batches
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, pyramid_levels
from pipeline.models.resample import pool, resize
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for
from pipeline.training.distributed import average_gradient, local_shards, sum_over_workers
from pipeline.training.hooks import failpoint
from pipeline.training.schedule import linear_decay_lr
from pipeline.training.state import TrainState

LR_SCALE, ROLLBACKS, BEST_SCORE, BEST_NIMG, BASE_ERROR, SPREAD, ERROR, SCORE = range(8)  # of extra["guard"]


class PairedBatch(NamedTuple):
    """One shard of the batch, seen through the frozen features."""

    text: Conditioning
    view: Perturbation
    real: Tensor  # [B,3,R,R]
    fake: Tensor  # [B,3,R,R], with graph
    fake_features: list[Tensor]  # with graph
    real_features: list[Tensor]
    anchor: Tensor  # scalar, with graph


def phase_error(fake: Tensor, real: Tensor, resolution: int) -> Tensor:
    """Mean squared error of [B,3,R,R] at half the core's `resolution`, of every phase of its grid on its own.

    A pooled error alone is blind to a pattern that repeats within a pixel of the core, as are discriminators
    that look at pooled images; the optimiser then drifts into a dither. A phase, every (R/resolution)-th pixel,
    sees such a pattern as an offset, while the place of an edge within its neighbourhood stays free."""
    return pool(F.pixel_unshuffle(fake - real, real.shape[-1] // resolution)).square().mean()


@dataclass
class AdversarialStep:
    """Discriminator update, then generator update, from one generator pass."""

    student: Denoiser
    heads: Heads
    frozen: list[FrozenFeatures]
    batches: Batches
    statistics: Statistics
    seed: int
    batch_size: int
    shards: int
    num_images: int
    lr: float
    discriminator_lr: float
    warmup_images: int
    anchor: float
    penalty_weight: float
    penalty_std: float
    penalty_interval: int
    sigma_start: float
    passes: tuple[int, ...]
    pass_probs: tuple[float, ...]

    def draw_passes(self, nimg: int) -> int:
        """Number of passes of this batch, the same on every worker."""
        generator = generator_for(self.seed, "passes", nimg)
        choice = torch.multinomial(torch.tensor(self.pass_probs), 1, generator=generator)
        return self.passes[int(choice)]

    def features(self, images: Tensor, text: Conditioning, view: Perturbation) -> list[Tensor]:
        """All frozen feature maps."""
        return [f for network in self.frozen for f in network(images, text, view)]

    def pair(self, nimg: int, shard: int, passes: int) -> PairedBatch:
        """Make fakes for one shard and look at them and at their real partners."""
        device = next(self.student.parameters()).device
        images, text = self.batches.at(nimg, shard).to(device)
        real = self.statistics.standardise(images)
        generator = generator_for(self.seed, "adversarial", nimg, shard, device)
        core_resolution = pyramid_levels(self.student)[0].resolution

        def normal(resolution: int) -> Tensor:
            shape = (len(real), 3, resolution, resolution)
            return torch.randn(shape, generator=generator, device=device)

        def draw(purpose: str, resolution: int) -> Tensor:
            return normal(resolution)

        start = resize(real, core_resolution) + self.sigma_start * normal(core_resolution)
        made = few_step(self.student, text, draw, passes, self.sigma_start, start)
        view = Perturbation(
            sigma=(torch.randn(len(real), generator=generator, device=device) - 2).exp(),
            noise=normal(core_resolution),
            shift=self.draw_shift(generator, real.shape[-1]),
        )
        fake = made[-1]
        with torch.no_grad():
            real_features = self.features(real, text, view)
        anchor = phase_error(fake, real, core_resolution)
        return PairedBatch(text, view, real, fake, self.features(fake, text, view), real_features, anchor)

    @staticmethod
    def draw_shift(generator: torch.Generator, resolution: int) -> tuple[int, int]:
        """Translation of up to an eighth of the image, each way."""
        most = resolution // 8
        device = generator.device
        dy, dx = torch.randint(-most, most + 1, (2,), generator=generator, device=device).tolist()
        return dy, dx

    def penalties(self, pair: PairedBatch, real: Tensor, fake: Tensor, nimg: int, shard: int) -> Tensor:
        """Finite-difference R1 + R2, for logits `real` and `fake` of the pair."""
        device = pair.real.device
        generator = generator_for(self.seed, "penalty", nimg, shard, device)
        noise = self.penalty_std * torch.randn(pair.real.shape, generator=generator, device=device)
        total = torch.zeros((), device=device)
        for images, logits in ((pair.real, real), (pair.fake.detach(), fake)):
            with torch.no_grad():
                features = self.features(images + noise, pair.text, pair.view)
            perturbed = self.heads(features, pair.text)
            total = total + difference_penalty(logits, perturbed, self.penalty_weight, self.penalty_std)
        return total * self.penalty_interval

    def __call__(self, state: TrainState) -> dict[str, Tensor]:
        """Do one update of both; returns metrics averaged over the batch."""
        generator, discriminator = state.learners["generator"], state.learners["discriminator"]
        nimg = state.nimg
        passes = self.draw_passes(nimg)
        shards = list(local_shards(self.shards))
        pairs = [self.pair(nimg, shard, passes) for shard in shards]
        penalise = (nimg // self.batch_size) % self.penalty_interval == 0
        scale = float(state.extra["guard"][LR_SCALE]) * linear_decay_lr(
            1.0, nimg, self.num_images, self.warmup_images
        )
        totals = torch.zeros(4, device=generator.weights.device)
        # Discriminator.
        self.heads.requires_grad_(True)
        for shard, pair in zip(shards, pairs, strict=True):
            real = self.heads(pair.real_features, pair.text)
            fake = self.heads([f.detach() for f in pair.fake_features], pair.text)
            loss = discriminator_loss(real, fake)
            penalty = self.penalties(pair, real, fake, nimg, shard) if penalise else loss.new_zeros(())
            (loss + penalty).backward()
            totals[0] += loss.detach()
            totals[3] += (real - fake).detach().mean()
        average_gradient(discriminator.grad, self.shards, nimg)
        discriminator.update(self.discriminator_lr * scale, nimg, self.batch_size)
        failpoint("discriminator", nimg)
        # Generator, through the updated heads.
        self.heads.requires_grad_(False)
        for pair in pairs:
            with torch.no_grad():
                real = self.heads(pair.real_features, pair.text)
            loss = generator_loss(real, self.heads(pair.fake_features, pair.text))
            (loss + self.anchor * pair.anchor).backward()
            totals[1] += loss.detach()
            totals[2] += pair.anchor.detach()
        average_gradient(generator.grad, self.shards, nimg)
        generator.update(self.lr * scale, nimg, self.batch_size)
        d, g, anchor, margin = (sum_over_workers(totals) / self.shards).unbind()
        return {"discriminator_loss": d, "generator_loss": g, "anchor": anchor, "margin": margin}
