"""Noise levels: which ones are trained, and which ones a sampler visits (arXiv 2206.00364, 2312.02696)."""

import math

import torch
from torch import Tensor


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


def karras_sigmas(num_steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> Tensor:
    """Noise levels float64 [num_steps + 1] from sigma_max down to sigma_min and 0 (2206.00364, eq. 5)."""
    i = torch.arange(num_steps, dtype=torch.float64)
    ramp = i / max(num_steps - 1, 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
