"""Shells on tiles: parts of large images, exactly as in a pass over the whole.

A shell is convolutional: its result on a tile depends on a window around it, the tile and a halo of the
network's receptive radius. Windows stay inside the image, where padding is as in the whole pass, and begin at
positions of the coarsest grid, so that pooling agrees. The level below sees the whole image; the shell gets
windows of its estimate and features.

Shapes: B images of R px, N tiles per image, T tiles picked, of `tile` px, in windows of w px.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.conditioning import Conditioning, split_level
from pipeline.models.denoiser import Denoiser, Estimate, ShellDenoiser, expand
from pipeline.models.kernels import SCALES
from pipeline.models.resample import high_pass, resize
from pipeline.models.shell import ShellNet

TILE = 64  # px
TILED_FROM = 256  # px of a shell that is trained on tiles
# Unnormalised probability of a tile without detail; mean detail adds 1. With 0.1 gradients are noisier
# (docs/log.md).
MIN_PROBABILITY = 1.0


class Tiles(NamedTuple):
    """Some tiles of a batch, int64 [T] each: image, row and column of the tile in it."""

    rows: Tensor
    y: Tensor
    x: Tensor


@dataclass(frozen=True)
class Tiling:
    """How images of one size are divided into tiles; all in px. `tile`, `halo` and the sides are multiples of the
    px of one position of every map that is divided."""

    height: int
    width: int
    tile: int
    halo: int

    @property
    def rows(self) -> int:
        """Rows of tiles in an image."""
        return self.height // self.tile

    @property
    def columns(self) -> int:
        """Tiles in a row of an image."""
        return self.width // self.tile

    @property
    def count(self) -> int:
        """Tiles of an image."""
        return self.rows * self.columns

    @property
    def window(self) -> int:
        """A tile with its halo."""
        return self.tile + 2 * self.halo

    def all_tiles(self, images: int, device: torch.device) -> Tiles:
        """All tiles of a number of images."""
        return self.from_index(torch.arange(images * self.count, device=device))

    def from_index(self, numbers: Tensor) -> Tiles:
        """Tiles by their numbers [T] in a batch: images, then rows, then columns."""
        inside = numbers % self.count
        return Tiles(numbers // self.count, inside // self.columns, inside % self.columns)

    def _starts(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Top and left of the windows."""
        top, left = (place * self.tile - self.halo for place in (tiles.y, tiles.x))
        return top.clamp(0, self.height - self.window), left.clamp(0, self.width - self.window)

    def windows(self, x: Tensor, tiles: Tiles) -> Tensor:
        """Windows of a map of any size: [B,C,h,h] to [T,C,w h/R,w h/R]."""
        px = self.width // x.shape[-1]
        top, left = self._starts(tiles)
        return _gather(x, tiles.rows, top // px, left // px, self.window // px)

    def tiles(self, x: Tensor, tiles: Tiles) -> Tensor:
        """Tiles without halo of a map of any size: [B,C,h,h] to [T,C,tile h/R,tile h/R]."""
        size = self.tile * x.shape[-1] // self.width
        return _gather(x, tiles.rows, tiles.y * size, tiles.x * size, size)

    def crop_halo(self, x: Tensor, tiles: Tiles) -> Tensor:
        """The tiles in their windows: [T,C,n,n] to [T,C,tile n/w,tile n/w]."""
        px = self.window // x.shape[-1]
        top, left = self._starts(tiles)
        y, across = (tiles.y * self.tile - top) // px, (tiles.x * self.tile - left) // px
        return _gather(x, torch.arange(len(x), device=x.device), y, across, self.tile // px)

    def scatter(self, x: Tensor, parts: Tensor, tiles: Tiles) -> Tensor:
        """`x` [B,C,h,h] with the tiles `parts` [T,C,n,n] in their places; a new tensor."""
        n = parts.shape[-1]
        cut = x.unflatten(3, (self.columns, n)).unflatten(2, (self.rows, n)).permute(0, 2, 4, 1, 3, 5)
        cut = cut.clone(memory_format=torch.contiguous_format)
        cut[tiles.rows, tiles.y, tiles.x] = parts
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _gather(x: Tensor, rows: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Squares of [B,C,h,h]: [T,C,size,size]."""
    steps = torch.arange(size, device=x.device)
    y, across = top[:, None] + steps, left[:, None] + steps
    squares = x.permute(0, 2, 3, 1)[rows[:, None, None], y[:, :, None], across[:, None, :]]
    return squares.permute(0, 3, 1, 2)


def receptive_radius(net: ShellNet) -> int:
    """px beyond the edge of a tile, at a position of the coarsest grid, that its result depends on."""
    blocks = len(net.encoder)
    margin = 1 + 2 * blocks + 2  # conv_out, the decoder, `up`: in fine positions
    margin = math.ceil(margin / 2) + 2 * blocks  # the middle: in coarse positions
    margin = 2 * _before(margin + 2, net)  # `down`
    for _ in range(blocks):
        margin = _before(margin + 2, net)
    return net.patch * (margin + 1)  # conv_in


def _before(margin: int, net: ShellNet) -> int:
    """`margin` before the adaptive kernels of an encoder block: up to the next cell of the coarsest branch, and
    one more."""
    if net.kernels == "off":
        return margin
    cell = 2 ** (SCALES - 1)
    return cell * (math.ceil(margin / cell) + 1)


def coarsest_px(shell: ShellDenoiser) -> int:
    """px of one position of the coarsest grid that the shell computes on, or gets from the level below."""
    own = 2 * shell.net.patch * (1 if shell.net.kernels == "off" else 2 ** (SCALES - 1))
    return max(own, 2 * shell.below.net.patch)


def tiling(shell: ShellDenoiser, size: Sequence[int], tile: int = TILE) -> Tiling:
    """Tiles for a shell and its images of `size`, (height, width) in px: of `tile` px, or the most that divides
    both sides; at least one position of the coarsest grid. Their windows may be larger than the images."""
    px, (height, width) = coarsest_px(shell), size
    halo = math.ceil(receptive_radius(shell.net) / px) * px
    return Tiling(height, width, max(math.gcd(tile, height, width), px), halo)


def tile_octave(
    shell: ShellDenoiser,
    noisy: Tensor,
    below: Estimate,
    sigma: Tensor,
    text: Conditioning,
    cut: Tiling,
    tiles: Tiles,
    low_sigma: Tensor | None = None,
) -> Estimate:
    """`shell.add_octave` for some tiles of the batch: [B,3,R,R] to an estimate of [T,3,tile,tile]."""
    c_noise, regions = split_level(sigma)
    bands = shell.band_conditioning(sigma, low_sigma)

    def windows(features: Tensor | None) -> Tensor | None:
        if features is None or features[0, 0].numel() == 1:
            return None if features is None else features[tiles.rows]
        grid = max(features.shape[-1], cut.width // coarsest_px(shell))
        return cut.windows(resize(features, grid), tiles)

    s = expand(sigma[tiles.rows], 1) if sigma.ndim == 1 else cut.windows(expand(sigma, cut.width), tiles)
    low = Estimate(cut.windows(below.denoised, tiles), cut.windows(below.features, tiles))
    conditioning = c_noise[tiles.rows], text.select(tiles.rows), windows(regions), windows(bands)
    denoised, features = shell.octave(cut.windows(noisy, tiles), low, s, *conditioning)
    return Estimate(cut.crop_halo(denoised, tiles), cut.crop_halo(features, tiles))


# --- Training.


def trained_tiles(denoiser: Denoiser, size: Sequence[int]) -> tuple[ShellDenoiser, Tiling, int] | None:
    """The shell, its tiling, and the number of tiles to train on of each image of `size` (height, width): their
    windows together have a quarter of its px. None where whole images are trained: cores, shells below TILED_FROM
    px, and where windows would not fit or not save half of the work."""
    if not isinstance(denoiser, ShellDenoiser) or denoiser.resolution < TILED_FROM:
        return None
    cut = tiling(denoiser, size)
    whole, part = cut.height * cut.width, cut.window**2
    saves = 2 * part <= whole and cut.window <= min(size)
    return (denoiser, cut, max(whole // (4 * part), 1)) if saves else None


def tile_probabilities(images: Tensor, variance: float, cut: Tiling) -> Tensor:
    """Probability [B,N] of each tile of clean images [B,3,R,R] to be drawn: proportional to MIN_PROBABILITY
    plus the energy of its high band over `variance`, the mean of real images."""
    energy = F.avg_pool2d(high_pass(images).square().mean(dim=1, keepdim=True), cut.tile).flatten(1)
    weights = MIN_PROBABILITY + energy * (4 / 3 / variance)
    return weights / weights.sum(dim=1, keepdim=True)


def draw_tiles(
    probabilities: Tensor, count: int, cut: Tiling, generator: torch.Generator
) -> tuple[Tiles, Tensor]:
    """Draw `count` tiles per image by their probabilities [B,N], with replacement. Returns them and 1 / (N p)
    of each [T], the weights that make a mean over them an unbiased estimate of the mean over all."""
    picked = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    num_tiles = probabilities.shape[1]
    first = torch.arange(len(probabilities), device=probabilities.device)[:, None] * num_tiles
    weight = 1 / (num_tiles * probabilities.gather(1, picked))
    return cut.from_index((first + picked).flatten()), weight.flatten()


def assess_tiles(
    shell: ShellDenoiser,
    images: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    text: Conditioning,
    cut: Tiling,
    tiles: Tiles,
    low_sigma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`shell.assess` for some tiles: (error, features, sigma of the tiles).

    sigma [B] gives an error for each tile [T]; a map [B,1,g,g] one for each of its patches in the tile, or for the
    tile, whichever is smaller [T,1,n,n]."""
    below = shell.estimate_below(noisy, sigma / 2 if low_sigma is None else low_sigma, text)
    estimate = tile_octave(shell, noisy, below, sigma, text, cut, tiles, low_sigma)
    if sigma.ndim == 1:
        levels = sigma[tiles.rows]
    else:
        levels = cut.tiles(resize(sigma, max(sigma.shape[-1], cut.columns)), tiles)
    return shell.high_error(estimate.denoised, cut.tiles(images, tiles), levels), estimate.features, levels
