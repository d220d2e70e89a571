"""The denoising update of one level of the pyramid: `step(state) -> metrics`, called by the loop in fit.py.

A step works on this worker's shards of the global batch. Each shard has random streams keyed by (seed, purpose,
nimg, shard), and sums run over shards in their order, so how shards are spread over workers changes no bit.
All random numbers of a shard are drawn first (`draw`); computing its loss from them is deterministic, and can be
recorded as a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.dataset import BatchSource
from pipeline.diffusion.loss import denoising_loss, tiled_loss
from pipeline.diffusion.noise import LowBand
from pipeline.diffusion.regions import bridge_maps
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.resample import rescale
from pipeline.models.statistics import Statistics
from pipeline.models.tiles import Tiles, draw_tiles, tile_probabilities, trained_tiles
from pipeline.rng import generator_for, key
from pipeline.training.cuda_graphs import RecordedBySize
from pipeline.training.distributed import local_shards, sum_over_shards
from pipeline.training.fit import Step
from pipeline.training.gradients import GradientSum
from pipeline.training.schedule import StepSettings, linear_decay_lr
from pipeline.training.state import TrainState

DrawSigma = Callable[[int, torch.Generator], Tensor]
DrawMaps = Callable[[Tensor, Sequence[int], torch.Generator], Tensor]  # see DenoisingStep
ImagesAndText = tuple[Tensor, Conditioning]  # [n,3,H,W] and n captions
DrawLow = Callable[[Tensor, Tensor, torch.Generator], LowBand]


class DrawnBatch(NamedTuple):
    """One shard's batch after all random draws; computing the loss from it is deterministic."""

    images: Tensor  # standardised, float32 [B,3,H,W]
    sigma: Tensor  # [B] or [B,1,h,w]
    noise: Tensor  # [B,3,H,W]
    text: Conditioning
    low: LowBand | None = None
    tiles: tuple[Tiles, Tensor] | None = None  # with their weights; None: whole images are trained


Loss = tuple[Tensor, Tensor]  # per image or patch: what is minimised, and the plain error


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(StepSettings):
    """Settings of a denoising step.

    text_dropout: fraction of images trained without their caption. bridge: arrange maps of noise levels by the
    denoiser's own estimate (pipeline/diffusion/regions.py). recorded: replay the forward and backward pass as a
    CUDA graph, with the same bits. compiled: torch.compile the loss, as one graph; validation and sampling stay
    eager."""

    text_dropout: float
    bridge: bool = False
    recorded: bool = False
    compiled: bool = False


@dataclass
class DenoisingStep:
    """Train `denoiser` (a core, or the outermost shell of a pyramid) on its denoising loss; large images on a few
    tiles each (pipeline/models/tiles.py).

    draw_sigma: noise levels of a batch. draw_maps: from levels [B] and the (height, width) of images to levels by
    patch [B,1,h,w]; None: levels stay as drawn. draw_low: low bands with a noise level of their own, for upscaling.
    suffix: distinguishes levels that train side by side, in the name of the learner ("net" + suffix), in the names
    of metrics and in the keys of random streams."""

    denoiser: Denoiser
    batches: BatchSource
    statistics: Statistics
    draw_sigma: DrawSigma
    settings: DenoisingSettings
    draw_maps: DrawMaps | None = None
    draw_low: DrawLow | None = None
    suffix: str = ""
    accumulate: Callable[[DrawnBatch], Tensor] = field(init=False)
    losses: tuple[Callable[..., Loss], Callable[..., Loss]] = field(init=False)

    def __post_init__(self) -> None:
        self.accumulate = RecordedBySize(self.add_gradient) if self.settings.recorded else self.add_gradient
        self.losses = denoising_loss, tiled_loss  # of whole images, of tiles
        if self.settings.compiled:
            one_graph = partial(torch.compile, fullgraph=True, dynamic=False)
            self.losses = one_graph(denoising_loss), one_graph(tiled_loss)

    def shard_loss(self, nimg: int, shard: int) -> tuple[Tensor, Tensor]:
        """(mean loss, mean plain error) of one shard."""
        return self.loss_of(self.draw(nimg, shard))

    def draw(self, nimg: int, shard: int) -> DrawnBatch:
        """Draw one shard, and seed torch's own generator, which dropout uses."""
        s, device = self.settings, next(self.denoiser.parameters()).device
        images, text = self.batches.at(nimg, shard).to(device)
        images = self.standardise(images)
        generator = generator_for(s.seed, f"diffusion{self.suffix}", nimg, shard, device)
        sigma = self.levels(images, generator)
        noise = torch.randn(images.shape, generator=generator, device=device)
        dropped = torch.rand(len(images), generator=generator, device=device) < s.text_dropout
        text = text.drop_captions(dropped)
        if s.bridge:
            own = generator_for(s.seed, f"bridge{self.suffix}", nimg, shard, device)
            sigma, noise = self.bridged(images, sigma, noise, text, own)
        torch.manual_seed(key(s.seed, f"dropout{self.suffix}", nimg, shard))
        low = None
        if self.draw_low is not None:
            low = self.draw_low(
                images, sigma, generator_for(s.seed, f"upscale{self.suffix}", nimg, shard, device)
            )
        tiles, tiled = None, trained_tiles(self.denoiser, images.shape[2:])
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
            tiled = trained_tiles(self.denoiser, images.shape[2:])
            assert tiled is not None
            shell, cut, _ = tiled
            loss, error = of_tiles(shell, images, sigma, noise, text, cut, tiles, low)
        return loss.mean(), error.mean()

    def add_gradient(self, drawn: DrawnBatch) -> Tensor:
        """Add one shard's gradient to those accumulated; returns (mean loss, mean plain error) [2]."""
        loss, error = self.loss_of(drawn)
        loss.backward()
        return torch.stack([loss.detach(), error])

    def levels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Noise levels of a shard, [B] or [B,1,h,w]. They must not depend on the images [B,3,H,W], or a map of
        levels would reveal what it hides: see docs/method.md, "Regions"."""
        sigma = self.draw_sigma(len(images), generator)
        return sigma if self.draw_maps is None else self.draw_maps(sigma, images.shape[2:], generator)

    @torch.no_grad()
    def bridged(
        self, images: Tensor, sigma: Tensor, noise: Tensor, text: Conditioning, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(levels, noise) of `bridge_maps` with the current denoiser, for images whose levels differ by patch; the
        other images keep their level and noise."""
        assert self.draw_low is None, "a bridge has no low band with a noise level of its own"
        rows = (sigma != sigma[:, :, :1, :1]).flatten(1).any(dim=1).nonzero()[:, 0]
        if len(rows) == 0:
            return sigma, noise
        self.denoiser.eval()  # no dropout
        estimate = partial(self.denoiser, text=text.select(rows))
        maps, map_noise = bridge_maps(estimate, images[rows], sigma[rows], noise[rows], generator)
        set_learning(self.denoiser)
        return sigma.index_copy(0, rows, maps), noise.index_copy(0, rows, map_noise)

    def standardise(self, images: Tensor) -> Tensor:
        """Grey levels at the data's resolution to standardised pixels at the denoiser's, by exact 2x2 means."""
        return rescale(self.statistics.standardise(images), self.denoiser.resolution)

    def __call__(self, state: TrainState) -> dict[str, Tensor]:
        """One update, skipped where it is not finite; returns metrics averaged over the batch."""
        learner = state.learners[f"net{self.suffix}"]
        set_learning(self.denoiser)
        s = self.settings
        lr = linear_decay_lr(s.lr, state.nimg, s.num_images, s.warmup_images)
        joint = isinstance(self.denoiser, ShellDenoiser) and self.denoiser.joint
        gradients, own = GradientSum(list(state.learners.values()) if joint else [learner]), []
        for shard in local_shards(s.shards):
            gradients.begin_shard()
            own.append(self.accumulate(self.draw(state.nimg, shard)).clone())  # a recording overwrites it
        gradients.finish()
        learner.grad.div_(s.shards)
        totals = sum_over_shards(own)
        norm = learner.update(lr, state.nimg, s.batch_size, totals)
        loss, error = (totals / s.shards).unbind()
        names = ("loss", "error", "gradient_norm")
        return {f"{name}{self.suffix}": value for name, value in zip(names, (loss, error, norm), strict=True)}


def set_learning(denoiser: Denoiser) -> None:
    """Training mode for a level, and for the levels below that its loss reaches (joint training)."""
    reached = True
    for level in pyramid_levels(denoiser)[::-1]:
        if level.training != reached:
            level.train(reached)  # also sets those below, which come next in this loop
        reached = reached and isinstance(level, ShellDenoiser) and level.joint


def in_turn(steps: Sequence[Step]) -> Step:
    """A step that runs `steps` one after the other on the same images, and merges their metrics.

    Levels that train jointly come finest first: what a shell's loss adds to the gradients of the levels below
    stays there until their own updates."""

    def run_all(state: TrainState) -> dict[str, Tensor]:
        return {name: value for step in steps for name, value in step(state).items()}

    return run_all


@torch.no_grad()
def held_out_error(
    denoiser: Denoiser, parts: Sequence[ImagesAndText], draw_sigma: DrawSigma, seed: int, repeats: int = 4
) -> float:
    """Mean weighted error on held-out images (standardised), over `repeats` draws of noise and levels.

    The draws are the same every time, so errors on one data set are comparable."""
    slices = [(part, slice(i, i + 64)) for part in parts for i in range(0, len(part[0]), 64)]
    total = 0.0
    for repeat in range(repeats):
        for i, ((images, text), some) in enumerate(slices):
            x = images[some]
            generator = generator_for(seed, "held-out", repeat, i, x.device)
            sigma = draw_sigma(len(x), generator)
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            noisy = x + sigma[:, None, None, None] * noise
            total += float(denoiser.error(x, noisy, sigma, text.select(some)).double().sum())
    return total / (repeats * sum(len(images) for images, _ in parts))
