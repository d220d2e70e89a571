"""The denoising loss (arXiv 2312.02696, eq. 21): squared error in network units, balanced by the learned
uncertainty u(sigma)."""

from typing import Protocol

from torch import Tensor

from pipeline.models.layers import Text


class Trainable(Protocol):
    """What the loss needs of a denoiser."""

    def error(self, images: Tensor, noisy: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """Weighted squared error of each image, [B]."""

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma), [B]."""


def denoising_loss(
    denoiser: Trainable, images: Tensor, sigma: Tensor, noise: Tensor, text: Text
) -> tuple[Tensor, Tensor]:
    """Loss and plain error of each image.

    images, noise: float32 [B,3,R,R], the noise standard normal; sigma [B]. Returns (error / exp u + u [B],
    error [B], detached)."""
    noisy = images + sigma[:, None, None, None] * noise
    error = denoiser.error(images, noisy, sigma, text)
    u = denoiser.logvar(sigma)
    return error / u.exp() + u, error.detach()
