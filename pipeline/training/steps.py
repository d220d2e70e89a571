"""One whole training update: `step(state, nimg) -> metrics`. The loop (fit.py) is the same for every stage.

A step takes this worker's shards of the global batch, each with random streams keyed by (seed, purpose,
nimg, shard), so that the result does not depend on how shards are spread over workers, but for the order of
floating-point sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.dataset import Batches
from pipeline.diffusion.loss import denoising_loss, tiled_loss
from pipeline.models.denoiser import Denoiser
from pipeline.models.layers import Text, pool
from pipeline.models.snapshot import Statistics
from pipeline.models.tiles import chances, draw_tiles, trained_tiles
from pipeline.rng import generator_for, key
from pipeline.training.optim import average_gradient, linear_decay_lr, my_shards, sum_over_workers
from pipeline.training.state import TrainState

DrawSigma = Callable[[int, torch.Generator], Tensor]


@dataclass
class DenoisingStep:
    """Train `denoiser` (a core, or a shell around a frozen one) on the denoising loss; of large images, on some
    tiles of each (pipeline/models/tiles.py)."""

    denoiser: Denoiser
    batches: Batches
    statistics: Statistics
    draw_sigma: DrawSigma
    seed: int
    batch_size: int
    shards: int
    lr: float
    warmup_images: int
    num_images: int
    text_dropout: float

    def shard_loss(self, nimg: int, shard: int) -> tuple[Tensor, Tensor]:
        """(mean loss, mean plain error) of one shard."""
        device = next(self.denoiser.parameters()).device
        images, text = self.batches.at(nimg, shard).to(device)
        images = self.standardise(images)
        generator = generator_for(self.seed, "diffusion", nimg, shard, device)
        sigma = self.draw_sigma(len(images), generator)
        noise = torch.randn(images.shape, generator=generator, device=device)
        dropped = torch.rand(len(images), generator=generator, device=device) < self.text_dropout
        torch.manual_seed(key(self.seed, "dropout", nimg, shard))
        given = images, sigma, noise, text.without(dropped)
        tiled = trained_tiles(self.denoiser)
        if tiled is None:
            loss, error = denoising_loss(self.denoiser, *given)
        else:
            shell, cut, count = tiled
            chance = chances(images, shell.high_band_variance, cut)
            loss, error = tiled_loss(shell, *given, cut, *draw_tiles(chance, count, cut, generator))
        return loss.mean(), error.mean()

    def standardise(self, images: Tensor) -> Tensor:
        """Grey levels at the data's resolution to standardised pixels at the denoiser's, by exact 2x2 means."""
        x = self.statistics.standardise(images)
        while x.shape[-1] > self.denoiser.resolution:
            x = pool(x)
        return x

    def __call__(self, state: TrainState) -> dict[str, Tensor]:
        """Do one update; returns metrics averaged over the batch."""
        learner = state.learners["net"]
        lr = linear_decay_lr(self.lr, state.nimg, self.num_images, self.warmup_images)
        totals = torch.zeros(2, device=learner.weights.device)
        for shard in my_shards(self.shards):
            loss, error = self.shard_loss(state.nimg, shard)
            loss.backward()
            totals += torch.stack([loss.detach(), error])
        average_gradient(learner.grad, self.shards, state.nimg)
        learner.update(lr, state.nimg, self.batch_size)
        loss, error = (sum_over_workers(totals) / self.shards).unbind()
        return {"loss": loss, "error": error}


@torch.no_grad()
def held_out_error(
    denoiser: Denoiser, images: Tensor, text: Text, draw_sigma: DrawSigma, seed: int, repeats: int = 4
) -> float:
    """Mean weighted error on held-out images [n,3,R,R] (standardised), over fixed noise and levels.

    The same draws every time, so that numbers of one data set compare."""
    device, total = images.device, 0.0
    for repeat in range(repeats):
        for i, start in enumerate(range(0, len(images), 64)):
            x = images[start : start + 64]
            generator = generator_for(seed, "held-out", repeat, i, device)
            sigma = draw_sigma(len(x), generator)
            noise = torch.randn(x.shape, generator=generator, device=device)
            noisy = x + sigma[:, None, None, None] * noise
            error = denoiser.error(x, noisy, sigma, text.select(slice(start, start + 64)))
            total += float(error.double().sum())
    return total / (repeats * len(images))
