"""Early exit of tiles: a tile whose estimate has settled is not computed any more.

How far the estimate D of a tile still is from its final value follows from how it moved: the covariance of the
clean image given the noisy one is sigma^2 dD/dz (Tweedie's formula of second order), and the last step shows
the effect of dD/dz. A tile whose predicted error is below half a grey level keeps its estimate until the end.
Its state still loses noise on the way to that estimate, so that its neighbours and the level below see the
noise level that they are conditioned on.
"""

from collections.abc import Sequence
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
    """When tiles are finished, and how much work that saved in all images so far."""

    tolerance: float  # predicted error (RMSE, standardised) below which a tile is finished
    tile: int = TILE  # px
    computed: float = 0.0  # calls of finest shells, as fractions of an image, halos included
    calls: int = 0  # of them, for all images

    @property
    def compute_fraction(self) -> float:
        """Fraction of the finest shells' work that was done."""
        return self.computed / self.calls if self.calls else 1.0


def predicted_error(moved: Tensor, changed: Tensor, sigma: Tensor, tile: int) -> Tensor:
    """RMSE [B,N] of the estimate of each tile at levels sigma [B], from the last step, in which z changed by
    `moved` [B,3,R,R] and D by `changed`: sigma (|changed| / |moved|)^(1/2).

    The ratio estimates the root mean square singular value of dD/dz, which is at least its mean eigenvalue."""
    size = [
        F.avg_pool2d(x.square().mean(dim=1, keepdim=True), tile).flatten(1).sqrt() for x in (changed, moved)
    ]
    return sigma[:, None] * (size[0] / size[1].clamp_min(1e-12)).sqrt()


class ActiveTiles:
    """A shell that computes only the active tiles of a batch of images: a denoiser for `Guided`, which `with_exit`
    then wraps into one for a sampler."""

    def __init__(
        self, shell: ShellDenoiser, num_images: int, size: Sequence[int], early_exit: TileEarlyExit
    ) -> None:
        """`size`: (height, width) of the images, px."""
        self.shell, self.early_exit = shell, early_exit
        self.tiling = tiling(shell, size, early_exit.tile)
        # On the CPU, since it decides what runs.
        self.active = torch.ones(num_images, self.tiling.count, dtype=torch.bool)

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise the active tiles of [B,3,R,R]; the others of the result are not to be used. With guidance the
        batch holds every image several times.

        An image is computed whole where its active tiles with their halos have as many px."""
        shell, tiles = self.shell, self.tiling
        below = shell.below.estimate(pool(noisy), sigma / 2, text)
        out = upsample(below.denoised)
        active = self.active.repeat(len(noisy) // len(self.active), 1)
        work = tiles.window**2 / (tiles.height * tiles.width)
        if tiles.window > min(tiles.height, tiles.width):
            work = 1.0  # windows do not fit: images are computed whole, or not at all
        fraction = active.sum(dim=1) * work

        # Whole images.
        whole = fraction >= 1
        rows = whole.nonzero()[:, 0].to(noisy.device)
        if len(rows):
            low = Estimate(below.denoised[rows], below.features[rows])
            out[rows] = shell.add_octave(noisy[rows], low, sigma[rows], text.select(rows)).denoised

        # Single tiles.
        index = (active & ~whole[:, None]).flatten().nonzero()[:, 0].to(noisy.device)
        if len(index):
            chosen = tiles.from_index(index)
            estimate = tile_octave(shell, noisy, below, sigma, text, tiles, chosen)
            out = tiles.scatter(out, estimate.denoised, chosen)

        self.early_exit.computed += float(fraction.clamp(max=1).sum())
        self.early_exit.calls += len(noisy)
        return out

    def with_exit(self, guided: Denoise) -> Denoise:
        """`guided`, a denoiser around this one, after each of whose calls settled tiles are made inactive."""
        previous: list[tuple[Tensor, Tensor]] = []

        def denoise(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
            denoised = guided(noisy, sigma, text)
            if previous:
                z, kept = previous.pop()
                cut = self.tiling
                mask = self.active.view(-1, 1, cut.rows, cut.columns).to(noisy.device)
                denoised = torch.where(F.interpolate(mask.float(), scale_factor=cut.tile) > 0, denoised, kept)
                error = predicted_error(noisy - z, denoised - kept, sigma, cut.tile)
                self.active &= (error >= self.early_exit.tolerance).cpu()
            previous.append((noisy, denoised))
            return denoised

        return denoise
