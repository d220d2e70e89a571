"""Tiles of a shell that are finished before the picture is: they keep their estimate, and cost nothing more.

How far an estimate D of a tile still is from what it will be, is known from how it moved: the covariance of the
clean image given the noisy one is sigma^2 dD/dz (Tweedie's formula of second order), and the last step shows
dD/dz at work. A tile whose predicted error is below half a grey level keeps its estimate until the end. Its state
goes on losing noise, towards that estimate, so that its neighbours and the level below see the noise level that
they are told.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.diffusion.guidance import Denoise
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Estimate, ShellDenoiser
from pipeline.models.resample import pool, upsample
from pipeline.models.tiles import TILE, tile_octave, tiling


@dataclass
class TileEarlyExit:
    """When tiles are finished, and what that saved in the pictures made so far."""

    tolerance: float  # predicted error (RMSE, standardised) below which a tile is finished
    tile: int = TILE  # px
    computed: float = 0.0  # calls of finest shells, as shares of an image, halos included
    calls: int = 0  # of them, for all pictures

    @property
    def share(self) -> float:
        """What part of the finest shells' work was done."""
        return self.computed / self.calls if self.calls else 1.0


def predicted_error(moved: Tensor, changed: Tensor, sigma: Tensor, tile: int) -> Tensor:
    """RMSE [B,N] of the estimate of each tile at levels sigma [B], from the last step, in which z changed by
    `moved` [B,3,R,R] and D by `changed`: sigma (|changed| / |moved|)^(1/2).

    The ratio estimates the root mean square singular value of dD/dz, which is no less than its mean eigenvalue."""
    size = [
        F.avg_pool2d(x.square().mean(dim=1, keepdim=True), tile).flatten(1).sqrt() for x in (changed, moved)
    ]
    return sigma[:, None] * (size[0] / size[1].clamp_min(1e-12)).sqrt()


class ActiveTiles:
    """A shell that computes what is not finished of one batch of pictures: a denoiser for `Guided`, wrapped by
    `finishing` into one for a sampler."""

    def __init__(self, shell: ShellDenoiser, pictures: int, finish: TileEarlyExit) -> None:
        self.shell, self.finish = shell, finish
        self.cut = tiling(shell, min(finish.tile, shell.resolution))
        self.open = torch.ones(
            pictures, self.cut.side**2, dtype=torch.bool
        )  # on the CPU: it decides what runs

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise the open tiles of [B,3,R,R]; what is finished is not to be used. With guidance the batch holds
        every picture several times.

        A picture is computed whole where its open tiles with their halos are no less than that."""
        shell, cut = self.shell, self.cut
        below = shell.below.estimate(pool(noisy), sigma / 2, text)
        is_open = self.open.repeat(len(noisy) // len(self.open), 1)
        part = is_open.sum(dim=1) * (cut.window / cut.resolution) ** 2
        whole = part >= 1
        out = upsample(below.denoised)
        rows = whole.nonzero()[:, 0].to(noisy.device)
        if len(rows):
            low = Estimate(below.denoised[rows], below.features[rows])
            out[rows] = shell.add_octave(noisy[rows], low, sigma[rows], text.select(rows)).denoised
        numbers = (is_open & ~whole[:, None]).flatten().nonzero()[:, 0].to(noisy.device)
        if len(numbers):
            tiles = cut.from_index(numbers)
            made = tile_octave(shell, noisy, below, sigma, text, cut, tiles)
            out = cut.scatter(out, made.denoised, tiles)
        self.finish.computed += float(part.clamp(max=1).sum())
        self.finish.calls += len(noisy)
        return out

    def finishing(self, guided: Denoise) -> Denoise:
        """`guided`, a denoiser around this one, with tiles finished after each of its calls."""
        before: list[tuple[Tensor, Tensor]] = []

        def denoise(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
            denoised = guided(noisy, sigma, text)
            if before:
                z, kept = before.pop()
                side, tile = self.cut.side, self.cut.tile
                mask = self.open.view(-1, 1, side, side).to(noisy.device)
                denoised = torch.where(F.interpolate(mask.float(), scale_factor=tile) > 0, denoised, kept)
                error = predicted_error(noisy - z, denoised - kept, sigma, tile)
                self.open &= (error >= self.finish.tolerance).cpu()
            before.append((noisy, denoised))
            return denoised

        return denoise
