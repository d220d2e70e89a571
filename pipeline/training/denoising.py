"""One whole training update: `step(state, nimg) -> metrics`. The loop (fit.py) is the same for every stage.

A step takes this worker's shards of the global batch, each with random streams keyed by (seed, purpose,
nimg, shard), so that the result does not depend on how shards are spread over workers, but for the order of
floating-point sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.dataset import Batches
from pipeline.diffusion.loss import denoising_loss, tiled_loss
from pipeline.diffusion.noise import LowBand
from pipeline.diffusion.regions import bridge_maps
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.resample import resize
from pipeline.models.statistics import Statistics
from pipeline.models.tiles import Tiles, draw_tiles, tile_probabilities, trained_tiles
from pipeline.rng import generator_for, key
from pipeline.training.cuda_graphs import Recorded
from pipeline.training.distributed import average_gradient, local_shards, sum_over_workers
from pipeline.training.fit import Step
from pipeline.training.schedule import linear_decay_lr
from pipeline.training.state import TrainState

DrawSigma = Callable[[int, torch.Generator], Tensor]
DrawLow = Callable[[Tensor, Tensor, torch.Generator], LowBand]


class DrawnBatch(NamedTuple):
    """All that chance has to say of one shard's update."""

    images: Tensor  # standardised, float32 [B,3,R,R]
    sigma: Tensor  # [B] or [B,1,g,g]
    noise: Tensor  # [B,3,R,R]
    text: Conditioning
    low: LowBand | None = None
    tiles: tuple[Tiles, Tensor] | None = None  # and their weights, where not whole images are trained


Loss = tuple[Tensor, Tensor]  # of each image or patch: what is minimised, and the plain error


@dataclass
class DenoisingStep:
    """Train `denoiser` (a core, or a shell around what is below) on its denoising loss; of large images, on some
    tiles of each (pipeline/models/tiles.py).

    `suffix` tells this level from others that train beside it: in the names of its learner ("net" + suffix), of
    its metrics, and of its random streams."""

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
    draw_low: DrawLow | None = None  # from images and levels, where low bands have a clock of their own
    bridge: bool = False  # whether maps of levels are arranged by the denoiser's own estimate
    suffix: str = ""
    recorded: bool = False  # forth and back as a CUDA graph, with the same bits
    compiled: bool = False  # the loss by torch.compile, one graph; validation and samples stay as they are
    accumulate: Callable[[DrawnBatch], Tensor] = field(init=False)
    losses: tuple[Callable[..., Loss], Callable[..., Loss]] = field(init=False)  # of whole images, of tiles

    def __post_init__(self) -> None:
        self.accumulate = Recorded(self.add_gradient) if self.recorded else self.add_gradient
        self.losses = denoising_loss, tiled_loss
        if self.compiled:
            one_graph = partial(torch.compile, fullgraph=True, dynamic=False)
            self.losses = one_graph(denoising_loss), one_graph(tiled_loss)

    def shard_loss(self, nimg: int, shard: int) -> tuple[Tensor, Tensor]:
        """(mean loss, mean plain error) of one shard."""
        return self.loss_of(self.draw(nimg, shard))

    def draw(self, nimg: int, shard: int) -> DrawnBatch:
        """One shard; seeds dropout as well."""
        device = next(self.denoiser.parameters()).device
        images, text = self.batches.at(nimg, shard).to(device)
        images = self.standardise(images)
        generator = generator_for(self.seed, f"diffusion{self.suffix}", nimg, shard, device)
        sigma = self.levels(images, generator)
        noise = torch.randn(images.shape, generator=generator, device=device)
        dropped = torch.rand(len(images), generator=generator, device=device) < self.text_dropout
        text = text.drop_captions(dropped)
        if self.bridge:
            own = generator_for(self.seed, f"bridge{self.suffix}", nimg, shard, device)
            sigma, noise = self.bridged(images, sigma, noise, text, own)
        torch.manual_seed(key(self.seed, f"dropout{self.suffix}", nimg, shard))
        low = None
        if self.draw_low is not None:
            low = self.draw_low(
                images, sigma, generator_for(self.seed, f"upscale{self.suffix}", nimg, shard, device)
            )
        tiles, tiled = None, trained_tiles(self.denoiser)
        if tiled is not None:
            shell, cut, count = tiled
            tiles = draw_tiles(
                tile_probabilities(images, shell.high_band_variance, cut), count, cut, generator
            )
        return DrawnBatch(images, sigma, noise, text, low, tiles)

    def loss_of(self, drawn: DrawnBatch) -> tuple[Tensor, Tensor]:
        """(mean loss, mean plain error) of one shard."""
        images, sigma, noise, text, low, tiles = drawn
        of_images, of_tiles = self.losses
        if tiles is None:
            loss, error = of_images(self.denoiser, images, sigma, noise, text, low)
        else:
            tiled = trained_tiles(self.denoiser)
            assert tiled is not None
            shell, cut, _ = tiled
            loss, error = of_tiles(shell, images, sigma, noise, text, cut, *tiles, low)
        return loss.mean(), error.mean()

    def add_gradient(self, drawn: DrawnBatch) -> Tensor:
        """Add the gradient of one shard to what is there; (mean loss, mean plain error) [2]."""
        loss, error = self.loss_of(drawn)
        loss.backward()
        return torch.stack([loss.detach(), error])

    def levels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Noise levels of a shard, without a look at its images [B,3,R,R]: see docs/method.md, "Regions"."""
        return self.draw_sigma(len(images), generator)

    @torch.no_grad()
    def bridged(
        self, images: Tensor, sigma: Tensor, noise: Tensor, text: Conditioning, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """`bridge_maps` by the denoiser as it is now, of those images whose levels differ; the others keep theirs,
        and their noise."""
        assert self.draw_low is None, "bridges do not know the low band's own clock"
        rows = (sigma != sigma[:, :, :1, :1]).flatten(1).any(dim=1).nonzero()[:, 0]
        if len(rows) == 0:
            return sigma, noise
        self.denoiser.eval()  # no dropout
        estimate = partial(self.denoiser, text=text.select(rows))
        maps, led = bridge_maps(estimate, images[rows], sigma[rows], noise[rows], generator)
        set_learning(self.denoiser)
        return sigma.index_copy(0, rows, maps), noise.index_copy(0, rows, led)

    def standardise(self, images: Tensor) -> Tensor:
        """Grey levels at the data's resolution to standardised pixels at the denoiser's, by exact 2x2 means."""
        return resize(self.statistics.standardise(images), self.denoiser.resolution)

    def __call__(self, state: TrainState) -> dict[str, Tensor]:
        """Do one update; returns metrics averaged over the batch."""
        learner = state.learners[f"net{self.suffix}"]
        set_learning(self.denoiser)
        lr = linear_decay_lr(self.lr, state.nimg, self.num_images, self.warmup_images)
        totals = torch.zeros(2, device=learner.weights.device)
        for shard in local_shards(self.shards):
            totals += self.accumulate(self.draw(state.nimg, shard))
        average_gradient(learner.grad, self.shards, state.nimg)
        learner.update(lr, state.nimg, self.batch_size)
        loss, error = (sum_over_workers(totals) / self.shards).unbind()
        return {f"loss{self.suffix}": loss, f"error{self.suffix}": error}


def set_learning(denoiser: Denoiser) -> None:
    """Training mode for a level, and for those below as far as its loss reaches."""
    reached = True
    for level in pyramid_levels(denoiser)[::-1]:
        if level.training != reached:
            level.train(reached)  # and all below, which are looked at next
        reached = reached and isinstance(level, ShellDenoiser) and level.joint


def in_turn(steps: Sequence[Step]) -> Step:
    """One update by each of `steps`, on the same images; their metrics together.

    Levels that train jointly come finest first: what the loss of a shell adds to the gradients of those below
    waits there for their own updates."""

    def step(state: TrainState) -> dict[str, Tensor]:
        return {name: value for one in steps for name, value in one(state).items()}

    return step


@torch.no_grad()
def held_out_error(
    denoiser: Denoiser, images: Tensor, text: Conditioning, draw_sigma: DrawSigma, seed: int, repeats: int = 4
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
