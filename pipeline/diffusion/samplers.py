"""Samplers at one resolution, from noise down a grid of levels; `sample_pyramid` chains them over a pyramid.

Heun's method (Karras et al., arXiv 2206.00364, algorithm 1) and DPM++(2M) (Lu et al., arXiv 2211.01095) follow the
deterministic probability-flow ODE with two calls and one call a step; SDE-DPM++(2M) (Lu et al.) is stochastic, with
one call. All are of second order, and in the precision of x.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.diffusion.guidance import Denoise
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import upsample

Levels = Tensor | Sequence[float]  # noise levels from high to low


def _full(x: Tensor, sigma: float) -> Tensor:
    return torch.full((x.shape[0],), sigma, device=x.device, dtype=x.dtype)


def _steps(sigmas: Levels) -> Iterable[tuple[float, float]]:
    """(sigma, next sigma) of each step, as numbers: what `torch.export` traces is the images alone."""
    return pairwise(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)


def heun(denoise: Denoise, x: Tensor, sigmas: Levels, text: Conditioning) -> Tensor:
    """Integrate the probability-flow ODE from x [B,3,R,R] at sigmas[0] down to sigmas[-1].

    Second order except for a last step to 0, which is Euler's (2206.00364, algorithm 1)."""
    for sigma, sigma_next in _steps(sigmas):
        slope = (x - denoise(x, _full(x, sigma), text)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            x = euler
        else:
            slope_next = (euler - denoise(euler, _full(x, sigma_next), text)) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x


MAX_RATIO = 1.5  # of a step to the last one, in the extrapolation: further ahead, the line leaves the curve


@dataclass
class History:
    """The last step of a multistep method: the estimate [B,3,R,R], and h, the step in ln sigma."""

    last: tuple[Tensor, float] | None = None

    def extrapolate(self, denoised: Tensor, h: float) -> Tensor:
        """D + (h / 2 h_prev)(D - D_prev), the estimate half a step ahead, with h / h_prev at most MAX_RATIO; D at
        the first step."""
        ahead = denoised
        if self.last is not None:
            ratio = min(h / self.last[1], MAX_RATIO)
            ahead = denoised + ratio / 2 * (denoised - self.last[0])
        self.last = denoised, h
        return ahead

    def upsample(self) -> None:
        """Continue at twice the resolution: the low band follows the same law there, the high band has no
        history."""
        if self.last is not None:
            self.last = upsample(self.last[0]), self.last[1]


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Levels, text: Conditioning, history: History | None = None
) -> Tensor:
    """DPM++(2M) (2211.01095, algorithm 2): the probability-flow ODE from x [B,3,R,R] at sigmas[0] down to
    sigmas[-1], one call a step, second order by extrapolating the last two estimates.

    z' = (s'/s) z + (1 - s'/s) D~, with D~ as in `sde_dpmpp_2m`."""
    history = history or History()
    for sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, _full(x, sigma), text)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        gain = -math.expm1(-h)  # 1 - s'/s
        x = (1 - gain) * x + gain * history.extrapolate(denoised, h)
    return x


def sde_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Levels,
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
    for i, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        denoised = denoise(x, _full(x, sigma), text)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        gain = -math.expm1(-2 * h)  # 1 - (s'/s)^2
        x = (1 - gain) * x + gain * history.extrapolate(denoised, h) + sigma_next * math.sqrt(gain) * draw(i)
    return x


SAMPLERS = ("heun", "dpmpp_2m", "sde_dpmpp_2m")
ADAPTIVE = "adaptive"  # for models trained with regions, see `sample_pyramid`


def integrate(
    sampler: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Levels,
    text: Conditioning,
    draw: Callable[[int], Tensor],
    history: History | None = None,
) -> Tensor:
    """Run one of SAMPLERS from x [B,3,R,R] at sigmas[0] down to sigmas[-1], in the precision of x.

    A multistep method continues from `history`, and updates it. ADAPTIVE is SDE-DPM++(2M) here, where all
    levels are equal."""
    if sampler == "heun":
        return heun(denoise, x, sigmas, text)
    if sampler == "dpmpp_2m":
        return dpmpp_2m(denoise, x, sigmas, text, history)
    return sde_dpmpp_2m(denoise, x, sigmas, text, draw, history)
