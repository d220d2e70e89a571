"""Upscaling: the shells of a model add their high bands to an image of any size, tile by tile.

The image is the low band, with a little noise of a fixed level (docs/method.md, "Upscaling"; noise on the input
is the conditioning augmentation of cascaded diffusion, arXiv 2106.15282); only the high band is sampled. A refined
shell adds it in one step, as in generation: around the image itself.
Networks work at the size they were trained at: an image is divided into overlapping tiles, each tile gets the
noise of its own place, and neighbours are blended. Rows of tiles are finished from top to bottom, so that
memory beyond the two images grows with their width alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.adversarial.few_step import HANDOVER
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import to_next_octave
from pipeline.diffusion.samplers import integrate
from pipeline.diffusion.schedule import handover_of
from pipeline.diffusion.seeds import Draw
from pipeline.errors import ConfigError
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SnapshotConfig
from pipeline.models.denoiser import ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, upsample
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for

SIGMA_MIN = 0.002
PLAIN_STEPS = 8  # of a model that is not refined
CELL = 64  # px of the noise that one generator fills, each way
Double = Callable[[Tensor, Draw], Tensor]  # pixels 0..255 [N,3,r,r] to [N,3,2r,2r]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class UpscaleSettings:
    """How an image is enlarged."""

    factor: int = 2  # or 4
    num_steps: int | None = None  # None: the model's own
    sigma_low: float | None = (
        None  # noise added to the image; None: 0.2 for refined shells in one step, else 0.05
    )
    project: bool = True  # keep the mean of every box of factor x factor px at the pixel it came from
    sampler: str = "dpmpp_2m"  # one of SAMPLERS
    overlap: float = 0.25  # of neighbouring tiles, as a fraction of a tile
    batch_size: int = 32


# --- One batch of tiles.


@torch.no_grad()
def add_high_band(
    shell: ShellDenoiser,
    low: Tensor,
    text: Conditioning,
    sigmas: Tensor,
    sigma_low: float,
    sampler: str,
    draw: Draw,
) -> Tensor:
    """Double standardised `low` [N,3,r,r], r the size that the level below works at, to [N,3,2r,2r].

    The low band stays at sigma_low and passes through the level below once; the high band, a separate state, goes
    through `sigmas` [n + 1] by one of SAMPLERS. `draw(purpose, size)` gives white noise [N,3,size,size]."""
    size = low.shape[-1]
    level = torch.full((len(low),), sigma_low, device=low.device)
    noisy = low + sigma_low * draw("low", size)
    below, low_upsampled = shell.below.estimate(noisy, level, text), upsample(noisy)

    def denoise(high: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        return high_pass(shell.add_octave(low_upsampled + high, below, sigma, text, level).denoised)

    start = high_pass(float(sigmas[0]) * draw("high", 2 * size))
    high = integrate(sampler, denoise, start, sigmas, text, lambda i: high_pass(draw(f"step-{i}", 2 * size)))
    return upsample(below.denoised) + high


@torch.no_grad()
def add_high_band_at_once(
    shell: ShellDenoiser, low: Tensor, text: Conditioning, sigma: float, sigma_low: float, draw: Draw
) -> Tensor:
    """As `add_high_band`, in one step from `sigma`, as refined shells are called: `low` is the low band and the
    estimate below; noise of sigma_low is on what the features of the level below are made from alone."""
    level = torch.full((len(low),), sigma_low, device=low.device)
    below = shell.below.estimate(low + sigma_low * draw("low", low.shape[-1]), level, text)
    noisy = to_next_octave(low, sigma, draw("high", 2 * low.shape[-1]))
    start = torch.full((len(low),), sigma, device=low.device)
    return shell.add_octave(noisy, below._replace(denoised=low), start, text).denoised


def noise_window(seed: int, purpose: str, top: int, left: int, size: int) -> Tensor:
    """White noise [3,size,size] of the square at (top, left) of an image: a function of seed and place alone."""
    rows, columns = (range(start // CELL, (start + size - 1) // CELL + 1) for start in (top, left))
    cells = [[_cell(seed, purpose, row, column) for column in columns] for row in rows]
    noise = torch.cat([torch.cat(row, dim=2) for row in cells], dim=1)
    y, x = top - rows.start * CELL, left - columns.start * CELL
    return noise[:, y : y + size, x : x + size]


def _cell(seed: int, purpose: str, row: int, column: int) -> Tensor:
    generator = generator_for(seed, f"upscale-{purpose}", row, column)
    return torch.randn(3, CELL, CELL, generator=generator)


# --- Tiles.


class ImageTiles(NamedTuple):
    """Tiles along one side of an image: `size` px each, the last `overlap` px of one are the first of the next."""

    length: int  # of the side
    size: int
    overlap: int  # even

    @property
    def starts(self) -> range:
        """Where tiles begin; the last one may reach beyond the image."""
        stride = self.size - self.overlap
        count = 1 + max(-(-(self.length - self.size) // stride), 0)
        return range(0, count * stride, stride)

    @property
    def padded(self) -> int:
        """px up to the end of the last tile."""
        return self.starts[-1] + self.size

    def weights(self, index: int) -> Tensor:
        """Blending weights of the px [size] of a tile; those of neighbours sum to 1. In the outermost quarter of an
        overlap the weight is 0, since estimates are worst at a border; then it rises linearly."""
        margin = self.overlap // 4
        ramp = (torch.arange(self.overlap) + 0.5 - margin) / max(self.overlap - 2 * margin, 1)
        weights = torch.ones(self.size)
        if index > 0:
            weights[: self.overlap] *= ramp.clamp(0, 1)
        if index + 1 < len(self.starts) and self.overlap:
            weights[-self.overlap :] *= ramp.clamp(0, 1).flip(0)
        return weights


# --- Pixel values.


def project_to_low_band(high: Tensor, low: Tensor) -> Tensor:
    """`low` [3,r,s] in 0..255, doubled, with the detail of `high` [3,2r,2s]: U low + HP high. Where a 2x2 box would
    leave 0..255 its detail is scaled down, so that the mean of every box is the pixel of `low`."""
    detail, base = high_pass(high[None])[0], upsample(low[None])[0]
    room = torch.where(detail > 0, 255 - base, base) / detail.abs().clamp_min(1e-6)
    boxes = room.clamp(max=1)[None]
    scale = -F.max_pool2d(-boxes, 2)  # the minimum of each box
    return base + upsample(scale)[0] * detail


def to_grey(images: Tensor, statistics: Statistics) -> Tensor:
    """Standardised pixels [...,3,H,W] as 0..255, neither rounded nor clipped."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in statistics)
    return (images * (std / 0.5) + mean + 1) * 127.5


# --- Images.


def shells_for(snapshot: Snapshot, factor: int) -> list[ShellDenoiser]:
    """The shells that enlarge an image by 2 or 4: the finest ones, coarse to fine; the finest one twice if it
    is the only one.

    Raises ConfigError where the model has none."""
    assert factor in (2, 4)
    shells = [level for level in pyramid_levels(snapshot.denoiser) if isinstance(level, ShellDenoiser)]
    if not shells:
        raise ConfigError("E-CFG-050", "upscale", "a core alone adds no detail", "take models/finetuned")
    chosen = shells[-2:] if factor == 4 else shells[-1:]
    return chosen if len(chosen) == factor // 2 else chosen * 2


def own_steps(config: SnapshotConfig) -> int:
    """Steps in which a model upscales by default. Raises ConfigError for a refined model that has no record of it:
    refined before there was one, or worse at it than the fine-tuned model."""
    if config.is_refined and config.upscale_steps is None:
        problem = "this refined model is not recorded to upscale better than the model it was refined from"
        raise ConfigError("E-CFG-050", "upscale", problem, "take models/finetuned, or give the steps")
    return config.upscale_steps or PLAIN_STEPS


def own_strength(config: SnapshotConfig, num_steps: int) -> float:
    """sigma_low by default."""
    return 0.2 if config.is_refined and num_steps == 1 else 0.05


def upscale(
    snapshot: Snapshot,
    image: Pixels,
    text: Conditioning,
    seed: int,
    settings: UpscaleSettings = UpscaleSettings(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Enlarge an image uint8 [H,W,3] of any size by `factor`: uint8 [fH,fW,3].

    `text` is one caption, for all tiles. With `project`, the mean of every box of factor x factor px is the
    pixel it came from, within one 8-bit level. `on_progress(done, total)` counts rows of tiles. Raises
    ConfigError as `shells_for` and `own_steps` do."""
    shells = shells_for(snapshot, settings.factor)
    sizes = [shell.resolution // 2 for shell in shells]
    overlaps = [2 * round(size * settings.overlap / 2) for size in sizes]
    heights = [image.shape[0] * 2**i for i in range(len(shells))]
    total = sum(len(ImageTiles(*side).starts) for side in zip(heights, sizes, overlaps, strict=True))
    done = 0
    for i, shell in enumerate(shells):
        double = _double(shell, snapshot, text, settings)
        rows = doubled_rows(image, sizes[i], overlaps[i], seed + i, double, settings.batch_size)
        height, width, _ = image.shape
        enlarged = np.empty((2 * height, 2 * width, 3), np.uint8)
        top = 0
        for row in rows:
            bottom = top + row.shape[1]
            if settings.project:
                low = torch.from_numpy(image[top // 2 : bottom // 2]).permute(2, 0, 1).float()
                row = project_to_low_band(row, low)
            enlarged[top:bottom] = row.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            top, done = bottom, done + 1
            if on_progress is not None:
                on_progress(done, total)
        image = enlarged
    return image


def _double(
    shell: ShellDenoiser, snapshot: Snapshot, text: Conditioning, settings: UpscaleSettings
) -> Double:
    """`add_high_band`, or for a refined shell in one step `add_high_band_at_once`, from pixels to pixels (0..255),
    with one caption for all."""
    device, config = next(shell.parameters()).device, snapshot.config
    steps = own_steps(config) if settings.num_steps is None else settings.num_steps
    at_once = config.is_refined and steps == 1
    strength = own_strength(config, steps) if settings.sigma_low is None else settings.sigma_low
    octave = len(pyramid_levels(shell)) - 2
    top = HANDOVER if at_once else handover_of(config.sampling.handover, octave)
    sigmas = karras_sigmas(steps, top * shell.sigma_high_band, SIGMA_MIN)

    def double(images: Tensor, draw: Draw) -> Tensor:
        def on_device(purpose: str, size: int) -> Tensor:
            return draw(purpose, size).to(device)

        low = snapshot.statistics.standardise(images.to(device))
        captions = text.select(torch.zeros(len(images), dtype=torch.int64)).to(device)
        if at_once:
            doubled = add_high_band_at_once(shell, low, captions, float(sigmas[0]), strength, on_device)
        else:
            doubled = add_high_band(shell, low, captions, sigmas, strength, settings.sampler, on_device)
        return to_grey(doubled, snapshot.statistics).cpu()

    return double


def doubled_rows(
    image: Pixels, size: int, overlap: int, seed: int, double: Double, batch_size: int
) -> Iterator[Tensor]:
    """Apply `double` to an image [H,W,3] in tiles of `size` px, a row of tiles at a time, from top to bottom:
    pixels 0..255 float32 [3,h,2W], whose heights sum to 2H."""
    height, width, _ = image.shape
    down, across = ImageTiles(height, size, overlap), ImageTiles(width, size, overlap)
    carried = torch.zeros(3, 0, 2 * across.padded)  # the lower overlap of the row above, weighted
    for i, top in enumerate(down.starts):
        row = _padded(image[top : top + size], size, across.padded)
        strip = torch.zeros(3, 2 * size, 2 * across.padded)
        for first in range(0, len(across.starts), batch_size):
            lefts = across.starts[first : first + batch_size]
            low = torch.stack([row[:, :, left : left + size] for left in lefts])
            tiles = double(low, partial(_noise, seed, size, top, lefts))
            for j, (left, tile) in enumerate(zip(lefts, tiles, strict=True), start=first):
                weights = across.weights(j).repeat_interleave(2)
                strip[:, :, 2 * left : 2 * (left + size)] += weights * tile
        strip *= down.weights(i).repeat_interleave(2)[:, None]
        strip[:, : carried.shape[1]] += carried
        last = i + 1 == len(down.starts)
        finished = 2 * (height - top) if last else 2 * (size - overlap)
        carried = strip[:, finished:].clone()
        yield strip[:, :finished, : 2 * width]


def _noise(seed: int, size: int, top: int, lefts: range, purpose: str, px: int) -> Tensor:
    """[N,3,px,px], for the tiles of `size` px at (top, lefts); px is `size` or its double."""
    scale = px // size
    return torch.stack([noise_window(seed, purpose, scale * top, scale * left, px) for left in lefts])


def _padded(pixels: Pixels, height: int, width: int) -> Tensor:
    """uint8 [h,w,3], continued by its mirror image: uint8 [3,height,width]."""
    below, right = height - pixels.shape[0], width - pixels.shape[1]
    padded = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="symmetric")
    return torch.from_numpy(padded).permute(2, 0, 1)
