"""Noise levels: which ones are trained, and which ones a sampler visits (arXiv 2206.00364, 2312.02696)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.resample import pool

LOW_SIGMAS = (0.005, 0.5)  # range of noise on low bands, in the training of upscaling


def lognormal_sigma(batch: int, p_mean: float, p_std: float, generator: torch.Generator) -> Tensor:
    """Draw sigma [batch] with ln sigma ~ N(p_mean, p_std^2)."""
    return (p_mean + p_std * torch.randn(batch, generator=generator, device=generator.device)).exp()


def truncated_lognormal_sigma(
    batch: int, p_mean: float, p_std: float, sigma_max: float, generator: torch.Generator
) -> Tensor:
    """Draw sigma [batch] with ln sigma ~ N(p_mean, p_std^2), conditioned on sigma <= sigma_max.

    By the inverse distribution function, so that every draw costs one uniform number."""
    top = 0.5 * (1 + math.erf((math.log(sigma_max) - p_mean) / (p_std * math.sqrt(2))))
    u = torch.rand(batch, generator=generator, device=generator.device).clamp(1e-6, 1 - 1e-6) * top
    return (p_mean + p_std * torch.special.ndtri(u)).exp()


class LowBand(NamedTuple):
    """The low band of a batch of a shell, where its noise level is not that of pooling."""

    images: Tensor  # [B,3,R/2,R/2]: the pooled images, some of them degraded
    sigma: Tensor  # its noise level, of the shape of the high band's


def draw_low_band(
    images: Tensor,
    sigma: Tensor,
    probability: float,
    generator: torch.Generator,
    degrade: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> LowBand:
    """Low bands of images [B,3,R,R] at sigma [B] or [B,1,g,g]: pooled, at the level that pooling gives; with
    `probability` at ln sigma_low ~ U(ln 0.005, ln 0.5) instead, after `degrade` of the pooled ones [n,3,R/2,R/2].

    Noise on the input of upscaling is the conditioning augmentation of cascaded diffusion (arXiv 2106.15282)."""
    chosen, position = torch.rand(2, len(images), generator=generator, device=generator.device)
    drawn = chosen < probability
    low, high = (math.log(level) for level in LOW_SIGMAS)
    level = (low + (high - low) * position).exp()
    shape = (-1,) + (1,) * (sigma.ndim - 1)
    small = pool(images)
    if degrade is not None:
        small[drawn] = degrade(small[drawn], generator)
    return LowBand(small, torch.where(drawn.view(shape), level.view(shape), sigma / 2))


def karras_sigmas(num_steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> Tensor:
    """Noise levels float64 [num_steps + 1] from sigma_max down to sigma_min and 0 (2206.00364, eq. 5)."""
    i = torch.arange(num_steps, dtype=torch.float64)
    ramp = i / max(num_steps - 1, 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
