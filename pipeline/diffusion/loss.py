"""The denoising loss (arXiv 2312.02696, eq. 21): squared error in network units, balanced by the learned
uncertainty u(sigma). Where levels differ by region, each patch has its own weight and its own u."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pipeline.diffusion.noise import LowBand
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import ShellDenoiser, expand
from pipeline.models.resample import high_pass, pool, upsample
from pipeline.models.tiles import Tiles, Tiling, assess_tiles

DIFFICULTY_WEIGHT = 0.01


class Trainable(Protocol):
    """The part of a denoiser that the loss uses."""

    @property
    def difficulty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Predicts ln E[error] of patches from (features, u); None: not trained with maps."""

    def assess(
        self, images: Tensor, noisy: Tensor, sigma: Tensor, text: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """(weighted squared error, of the shape of sigma; decoder features)."""

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma), of the shape of sigma."""


def denoising_loss(
    denoiser: Trainable,
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    text: Conditioning,
    low: LowBand | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and plain error of each image, or of each patch.

    images, noise: float32 [B,3,R,R], the noise standard normal; sigma [B], or [B,1,g,g] by patches. Returns
    (error / exp u + u, error detached), of the shape of sigma. With maps, the head that predicts the
    difficulty h of patches learns by the same rule from the detached error, at a weight of 0.01. `low` replaces the
    low band of a shell's images, at its own noise level."""
    noisy = noised(images, sigma, noise, low)
    if low is None:
        error, features = denoiser.assess(images, noisy, sigma, text)
    else:
        assert isinstance(denoiser, ShellDenoiser)
        error, features = denoiser.assess(images, noisy, sigma, text, low.sigma)
    return balanced(denoiser, error, features, sigma), error.detach()


def noised(images: Tensor, sigma: Tensor, noise: Tensor, low: LowBand | None = None) -> Tensor:
    """x + sigma noise, [B,3,R,R]; with `low` U(low + sigma_low eps) + HP(x + sigma noise), where eps = 2 P noise is
    white and independent of HP noise."""
    size = images.shape[-1]
    noisy = images + expand(sigma, size) * noise
    if low is None:
        return noisy
    return upsample(low.images + expand(low.sigma, size // 2) * 2 * pool(noise)) + high_pass(noisy)


def balanced(denoiser: Trainable, error: Tensor, features: Tensor, sigma: Tensor) -> Tensor:
    """error / exp u + u, plus the loss of the head that predicts difficulty; of the shape of sigma."""
    u = denoiser.logvar(sigma)
    loss = error / u.exp() + u
    if denoiser.difficulty is not None and sigma.ndim == 4:
        h = denoiser.difficulty(features, u)
        loss = loss + DIFFICULTY_WEIGHT * (error.detach() / h.exp() + h)
    return loss


def tiled_loss(
    shell: ShellDenoiser,
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    text: Conditioning,
    cut: Tiling,
    weighted_tiles: tuple[Tiles, Tensor],
    low: LowBand | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and error of some tiles (pipeline/models/tiles.py), times their weights [T].

    With weights 1 / (N p), for tiles drawn with probability p from the N of an image, the means are unbiased
    estimates of those over whole images."""
    tiles, weight = weighted_tiles
    noisy, low_sigma = noised(images, sigma, noise, low), None if low is None else low.sigma
    error, features, sigma = assess_tiles(shell, images, noisy, sigma, text, cut, tiles, low_sigma)
    weight = weight.view(-1, *[1] * (error.ndim - 1))
    return weight * balanced(shell, error, features, sigma), weight * error.detach()
