"""The denoising loss (arXiv 2312.02696, eq. 21): squared error in network units, balanced by the learned
uncertainty u(sigma). Where levels differ by region, each patch has its own weight and its own u."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pipeline.diffusion.noise import LowBand
from pipeline.models.denoiser import ShellDenoiser, expand
from pipeline.models.layers import Text, high_pass, pool, upsample

DIFFICULTY_WEIGHT = 0.01


class Trainable(Protocol):
    """What the loss needs of a denoiser."""

    @property
    def difficulty(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Predicts ln E[error] of patches from (features, u); None: not trained with maps."""

    def assess(self, images: Tensor, noisy: Tensor, sigma: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """(weighted squared error, of the shape of sigma; decoder features)."""

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma), of the shape of sigma."""


def denoising_loss(
    denoiser: Trainable,
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    text: Text,
    low: LowBand | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and plain error of each image, or of each patch.

    images, noise: float32 [B,3,R,R], the noise standard normal; sigma [B], or [B,1,g,g] by patches. Returns
    (error / exp u + u, error detached), of the shape of sigma. With maps, the head that predicts the
    difficulty h of patches learns by the same rule from the detached error, at a weight of 0.01. A shell may find
    `low` in its low band, with noise of its own: z = U(low + sigma_low eps) + HP(x + sigma noise), where
    eps = 2 P noise is white and independent of HP noise."""
    size = images.shape[-1]
    noisy = images + expand(sigma, size) * noise
    if low is None:
        error, features = denoiser.assess(images, noisy, sigma, text)
    else:
        assert isinstance(denoiser, ShellDenoiser)
        held = low.images + expand(low.sigma, size // 2) * 2 * pool(noise)
        noisy = upsample(held) + high_pass(noisy)
        error, features = denoiser.assess(images, noisy, sigma, text, low.sigma)
    u = denoiser.logvar(sigma)
    loss = error / u.exp() + u
    if denoiser.difficulty is not None and sigma.ndim == 4:
        h = denoiser.difficulty(features, u)
        loss = loss + DIFFICULTY_WEIGHT * (error.detach() / h.exp() + h)
    return loss, error.detach()
