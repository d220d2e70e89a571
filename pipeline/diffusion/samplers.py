"""Samplers of one resolution: Heun's method, DPM++(2M) and SDE-DPM++(2M)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.diffusion.guidance import Denoise
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import upsample


def _full(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.full((len(x),), float(sigma), device=x.device, dtype=x.dtype)


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, text: Conditioning) -> Tensor:
    """Integrate the probability-flow ODE from x [B,3,R,R] at sigmas[0] down to sigmas[-1].

    Second order except for a last step to 0, which is Euler's (2206.00364, algorithm 1)."""
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, _full(x, sigma), text)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            x = euler
        else:
            slope_next = (euler - denoise(euler, _full(x, sigma_next), text)) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x


@dataclass
class History:
    """What a method of two steps knows of the last one: the estimate [B,3,R,R], and h."""

    last: tuple[Tensor, Tensor] | None = None

    def extrapolate(self, denoised: Tensor, h: Tensor) -> Tensor:
        """D + (h / 2 h_prev)(D - D_prev), the estimate half a step ahead; D where there is no step before."""
        ahead = denoised
        if self.last is not None:
            ahead = denoised + (h / (2 * self.last[1])) * (denoised - self.last[0])
        self.last = denoised, h
        return ahead

    def upsample(self) -> None:
        """Go on at twice the resolution: the low band has one law at both, of the high band nothing is known."""
        if self.last is not None:
            self.last = upsample(self.last[0]), self.last[1]


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, text: Conditioning, history: History | None = None
) -> Tensor:
    """DPM++(2M) (2211.01095, algorithm 2): the probability-flow ODE from x [B,3,R,R] at sigmas[0] down to
    sigmas[-1], one call a step, second order by extrapolating the last two estimates.

    z' = (s'/s) z + (1 - s'/s) D~, with D~ as in `sde_dpmpp_2m`."""
    history = history or History()
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, _full(x, sigma), text)
        if sigma_next == 0:
            return denoised
        h = (sigma / sigma_next).log()
        gain = -torch.expm1(-h)  # 1 - s'/s
        x = (1 - gain) * x + gain * history.extrapolate(denoised, h)
    return x


def sde_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    text: Conditioning,
    draw: Callable[[int], Tensor],
    history: History | None = None,
) -> Tensor:
    """SDE-DPM++(2M) (2211.01095): from x [B,3,R,R] at sigmas[0] down to sigmas[-1], one call and one
    draw a step, second order by extrapolating the last two estimates.

    z' = (s'/s)^2 z + (1 - (s'/s)^2) D~ + s' sqrt(1 - (s'/s)^2) eps,  D~ = D + (h / 2 h_prev)(D - D_prev),
    h = ln(s/s'); D~ = D on the last step, to 0, and on the first one without `history`. `draw(i)` gives the noise
    of step i."""
    history = history or History()
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, _full(x, sigma), text)
        if sigma_next == 0:
            return denoised
        h = (sigma / sigma_next).log()
        gain = -torch.expm1(-2 * h)  # 1 - (s'/s)^2
        x = (1 - gain) * x + gain * history.extrapolate(denoised, h) + sigma_next * gain.sqrt() * draw(i)
    return x


SAMPLERS = ("heun", "dpmpp_2m", "sde_dpmpp_2m")
ADAPTIVE = "adaptive"  # for models trained with regions, see `sample_pyramid`


def integrate(
    sampler: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    text: Conditioning,
    draw: Callable[[int], Tensor],
    history: History | None = None,
) -> Tensor:
    """Run one of SAMPLERS from x [B,3,R,R] at sigmas[0] down to sigmas[-1], in the precision of x.

    A method of two steps goes on from `history`, and leaves there what it knows. ADAPTIVE is SDE-DPM++(2M) here,
    where all levels are equal."""
    if sampler == "heun":
        return heun(denoise, x, sigmas, text)
    if sampler == "dpmpp_2m":
        return dpmpp_2m(denoise, x, sigmas, text, history)
    return sde_dpmpp_2m(denoise, x, sigmas, text, draw, history)
