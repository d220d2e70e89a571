"""Upscaling: a shell's high band on somebody's picture, of any size, in tiles.

The picture is the low band, with a little noise of a fixed level (docs/method.md, "Upscaling"); only the high
band is sampled. Networks work at the size they were trained at: a picture is cut into tiles that overlap, every
tile finds the noise of its own place on one canvas, and neighbours fade into one another. Rows of tiles are
finished from top to bottom, so that, beyond the two pictures, memory grows with their width alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import handover_of
from pipeline.diffusion.samplers import integrate
from pipeline.diffusion.seeds import Draw
from pipeline.errors import ConfigError
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, upsample
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for

SIGMA_LOW = 0.05  # default noise on the picture
SIGMA_MIN = 0.002
NUM_STEPS = 8
CELL = 64  # px of the noise canvas that one generator fills, each way
Double = Callable[[Tensor, Draw], Tensor]  # grey levels [N,3,r,r] to [N,3,2r,2r]
Pixels = NDArray[np.uint8]


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
    """The doubled images [N,3,2r,2r] of standardised `low` [N,3,r,r], r the size that the level below works at.

    The low band stays at sigma_low, and the level below looks at it once; the high band, a state of its own, goes
    through `sigmas` [n + 1] by one of SAMPLERS. `draw(purpose, size)` gives white noise [N,3,size,size]."""
    size = low.shape[-1]
    level = torch.full((len(low),), sigma_low, device=low.device)
    noisy = low + sigma_low * draw("low", size)
    below, held = shell.below.estimate(noisy, level, text), upsample(noisy)

    def denoise(high: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        return high_pass(shell.add_octave(held + high, below, sigma, text, level).denoised)

    start = high_pass(float(sigmas[0]) * draw("high", 2 * size))
    high = integrate(sampler, denoise, start, sigmas, text, lambda i: high_pass(draw(f"step-{i}", 2 * size)))
    return upsample(below.denoised) + high


def canvas(seed: int, purpose: str, top: int, left: int, size: int) -> Tensor:
    """White noise [3,size,size] of the square at (top, left) of a picture: a function of seed and place alone."""
    rows, columns = (range(start // CELL, (start + size - 1) // CELL + 1) for start in (top, left))
    cells = [[_cell(seed, purpose, row, column) for column in columns] for row in rows]
    whole = torch.cat([torch.cat(row, dim=2) for row in cells], dim=1)
    y, x = top - rows.start * CELL, left - columns.start * CELL
    return whole[:, y : y + size, x : x + size]


def _cell(seed: int, purpose: str, row: int, column: int) -> Tensor:
    generator = generator_for(seed, f"upscale-{purpose}", row, column)
    return torch.randn(3, CELL, CELL, generator=generator)


# --- Tiles.


class ImageTiles(NamedTuple):
    """Tiles along one side of a picture: `size` px each, the last `overlap` px of one are the first of the next."""

    length: int  # of the side
    size: int
    overlap: int  # even

    @property
    def starts(self) -> range:
        """Where tiles begin; the last one may reach beyond the picture."""
        stride = self.size - self.overlap
        count = 1 + max(-(-(self.length - self.size) // stride), 0)
        return range(0, count * stride, stride)

    @property
    def padded(self) -> int:
        """px up to the end of the last tile."""
        return self.starts[-1] + self.size

    def share(self, index: int) -> Tensor:
        """How much each px [size] of a tile counts: shares of neighbours sum to 1. In an overlap its outermost
        quarter is left to the neighbour, since networks know least at a border; then it rises linearly."""
        margin = self.overlap // 4
        ramp = (torch.arange(self.overlap) + 0.5 - margin) / max(self.overlap - 2 * margin, 1)
        weights = torch.ones(self.size)
        if index > 0:
            weights[: self.overlap] *= ramp.clamp(0, 1)
        if index + 1 < len(self.starts) and self.overlap:
            weights[-self.overlap :] *= ramp.clamp(0, 1).flip(0)
        return weights


# --- Grey levels.


def project_to_low_band(high: Tensor, low: Tensor) -> Tensor:
    """`low` [3,r,s] in 0..255, doubled, with the detail of `high` [3,2r,2s]: U low + HP high. In a 2x2 box where
    that would leave 0..255 the detail shrinks, so that the mean of every box stays that of `low`."""
    detail, base = high_pass(high[None])[0], upsample(low[None])[0]
    room = torch.where(detail > 0, 255 - base, base) / detail.abs().clamp_min(1e-6)
    boxes = room.clamp(max=1)[None]
    least = -F.max_pool2d(-boxes, 2)
    return base + upsample(least)[0] * detail


def to_grey(images: Tensor, statistics: Statistics) -> Tensor:
    """Standardised pixels [...,3,H,W] in grey levels, neither rounded nor clipped."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in statistics)
    return (images * (std / 0.5) + mean + 1) * 127.5


# --- Pictures.


def shells_for(snapshot: Snapshot, factor: int) -> list[ShellDenoiser]:
    """The shells that make a picture 2 or 4 times as large: the finest ones, coarse to fine; the finest one twice
    where there is one only.

    Raises ConfigError where the model has none, or was refined."""
    assert factor in (2, 4)
    where, fix = "upscale", "take models/finetuned"
    if snapshot.config.is_refined:
        problem = "a refined model makes detail in one step from noise, whatever the picture"
        raise ConfigError("E-CFG-050", where, problem, fix)
    shells = [level for level in pyramid_levels(snapshot.denoiser) if isinstance(level, ShellDenoiser)]
    if not shells:
        raise ConfigError("E-CFG-050", where, "a core alone adds no detail", fix)
    chosen = shells[-2:] if factor == 4 else shells[-1:]
    return chosen if len(chosen) == factor // 2 else chosen * 2


def upscale(
    snapshot: Snapshot,
    picture: Pixels,
    text: Conditioning,
    seed: int,
    factor: int = 2,
    num_steps: int = NUM_STEPS,
    sigma_low: float = SIGMA_LOW,
    project: bool = True,
    sampler: str = "dpmpp_2m",
    overlap: float = 0.25,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """A picture uint8 [H,W,3] of any size, `factor` (2 or 4) times as large: uint8 [fH,fW,3].

    `text` is one caption, for all tiles; `overlap` is a share of a tile. With `project`, the mean of every box of
    factor x factor px is the pixel it came from, within one grey level. `progress(done, all)` hears of finished
    rows of tiles. Raises ConfigError as `shells_for` does."""
    shells = shells_for(snapshot, factor)
    tiles = [shell.resolution // 2 for shell in shells]
    laps = [2 * round(size * overlap / 2) for size in tiles]
    heights = [picture.shape[0] * 2**i for i in range(len(shells))]
    total = sum(len(ImageTiles(*side).starts) for side in zip(heights, tiles, laps, strict=True))
    done = 0
    for number, shell in enumerate(shells):
        double = _double(shell, snapshot, text, num_steps, sigma_low, sampler)
        rows = doubled_rows(picture, tiles[number], laps[number], seed + number, double, batch_size)
        height, width, _ = picture.shape
        made = np.empty((2 * height, 2 * width, 3), np.uint8)
        top = 0
        for grey in rows:
            bottom = top + grey.shape[1]
            if project:
                low = torch.from_numpy(picture[top // 2 : bottom // 2]).permute(2, 0, 1).float()
                grey = project_to_low_band(grey, low)
            made[top:bottom] = grey.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            top, done = bottom, done + 1
            if progress is not None:
                progress(done, total)
        picture = made
    return picture


def _double(
    shell: ShellDenoiser,
    snapshot: Snapshot,
    text: Conditioning,
    num_steps: int,
    sigma_low: float,
    sampler: str,
) -> Double:
    """`add_high_band` between grey levels, with one caption for all."""
    device = next(shell.parameters()).device
    octave = len(pyramid_levels(shell)) - 2
    top = handover_of(snapshot.config.sampling.handover, octave) * shell.sigma_high_band
    sigmas = karras_sigmas(num_steps, top, SIGMA_MIN)

    def double(images: Tensor, draw: Draw) -> Tensor:
        low = snapshot.statistics.standardise(images.to(device))
        many = text.select(torch.zeros(len(images), dtype=torch.int64)).to(device)
        made = add_high_band(
            shell, low, many, sigmas, sigma_low, sampler, lambda *what: draw(*what).to(device)
        )
        return to_grey(made, snapshot.statistics).cpu()

    return double


def doubled_rows(
    picture: Pixels, size: int, overlap: int, seed: int, double: Double, batch_size: int
) -> Iterator[Tensor]:
    """What `double` makes of a picture [H,W,3] in tiles of `size` px, a row of tiles at a time, from top to bottom:
    grey levels float32 [3,h,2W], whose heights sum to 2H."""
    height, width, _ = picture.shape
    down, across = ImageTiles(height, size, overlap), ImageTiles(width, size, overlap)
    carried = torch.zeros(3, 0, 2 * across.padded)  # what the row above left to its neighbour
    for i, top in enumerate(down.starts):
        row = _padded(picture[top : top + size], size, across.padded)
        strip = torch.zeros(3, 2 * size, 2 * across.padded)
        for first in range(0, len(across.starts), batch_size):
            lefts = across.starts[first : first + batch_size]
            low = torch.stack([row[:, :, left : left + size] for left in lefts])
            made = double(low, partial(_noise, seed, size, top, lefts))
            for j, (left, tile) in enumerate(zip(lefts, made, strict=True), start=first):
                share = across.share(j).repeat_interleave(2)
                strip[:, :, 2 * left : 2 * (left + size)] += share * tile
        strip *= down.share(i).repeat_interleave(2)[:, None]
        strip[:, : carried.shape[1]] += carried
        last = i + 1 == len(down.starts)
        finished = 2 * (height - top) if last else 2 * (size - overlap)
        carried = strip[:, finished:].clone()
        yield strip[:, :finished, : 2 * width]


def _noise(seed: int, size: int, top: int, lefts: range, purpose: str, px: int) -> Tensor:
    """[N,3,px,px], for the tiles of `size` px at (top, lefts); px is `size` or its double."""
    scale = px // size
    return torch.stack([canvas(seed, purpose, scale * top, scale * left, px) for left in lefts])


def _padded(pixels: Pixels, height: int, width: int) -> Tensor:
    """uint8 [h,w,3], continued by its mirror image: uint8 [3,height,width]."""
    below, right = height - pixels.shape[0], width - pixels.shape[1]
    whole = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="symmetric")
    return torch.from_numpy(whole).permute(2, 0, 1)
