"""A stochastic sampler whose noise level differs by region, easy regions first.

Every patch has its own noise level. If the maps of training do not depend on the image, the trained denoiser is
exact for every map; and a sampler that chooses the next map from its own estimates, and draws fresh noise,
stays exact as its steps shrink. Choosing maps from the clean image, or following such maps without fresh noise
(an ODE), does not (tests/diffusion/test_adaptive.py shows all three). The step is SDE-DPM++(2M) (Lu et al.,
arXiv 2211.01095), elementwise; regions of different levels are those of Patch Forcing (arXiv 2604.19141).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.regions import smooth
from pipeline.diffusion.samplers import MAX_RATIO
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import PATCH, Denoiser, expand

# (z, sigma by patches [B,1,g,g]) to (denoised, difficulty of patches)
RegionDenoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MAX_AHEAD = 2  # steps of the grid that a patch may take at once


def rank(difficulty: Tensor) -> Tensor:
    """Place of each patch of [B,1,g,g] in its image's order, from 0 to 1."""
    flat = difficulty.flatten(1)
    order = flat.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (order / max(flat.shape[1] - 1, 1)).view(difficulty.shape)


def easy_first(difficulty: Tensor) -> Tensor:
    """How much each patch leads, from -1 to 1: [B,1,g,g] to [B,1,g,g], smoothed over 3x3 patches."""
    return smooth(1 - 2 * rank(difficulty))


def next_place(place: Tensor, step: int, last: int, delta: float, lead: Tensor) -> Tensor:
    """Where on the grid of noise levels (0 to `last`, in steps) patches go with step number `step`.

    The target is tau + 4 delta tau (1 - tau) lead, tau = (step + 1) / last; a patch never goes back, and at
    most two steps ahead, since changes of the order would else make huge steps."""
    tau = (step + 1) / last
    target = (step + 1 + last * delta * 4 * tau * (1 - tau) * lead.double()).clamp(0, last)
    return torch.minimum(torch.maximum(target, place), place + MAX_AHEAD)


def sigma_at(place: Tensor, sigmas: Tensor) -> Tensor:
    """Levels float64 at places on a grid `sigmas` [n] of positive ones, geometric between its points."""
    left = place.floor().long().clamp(max=len(sigmas) - 1)
    right = (left + 1).clamp(max=len(sigmas) - 1)
    return sigmas[left] * (sigmas[right] / sigmas[left]) ** (place - left)


def sde_dpmpp_2m_adaptive(
    estimate: RegionDenoiser,
    x: Tensor,
    sigmas: Tensor,
    draw: Callable[[int], Tensor],
    patch: int,
    delta: float = 0.15,
    lead: Callable[[Tensor], Tensor] = easy_first,
) -> Tensor:
    """Sample from x [B,C,H,W] at sigmas[0]; one call a step. `sigmas` float64 [N+1] ends in 0.

    `patch` px share a level, each way; `draw(i)` gives the noise of step i; `delta` limits how far a patch may
    lead or lag, as a fraction of the run, and `lead` gives that from the difficulty of patches [B,1,h,w]. delta
    = 0 gives the bits of `sde_dpmpp_2m`."""

    def pixels(field: Tensor) -> Tensor:
        return field.to(x.dtype).repeat_interleave(patch, dim=-1).repeat_interleave(patch, dim=-2)

    grid, last = sigmas[:-1].to(x.device, torch.float64), len(sigmas) - 2
    shape = (len(x), 1, x.shape[-2] // patch, x.shape[-1] // patch)
    place = torch.zeros(shape, dtype=torch.float64, device=x.device)
    sigma = sigma_at(place, grid)
    previous: tuple[Tensor, Tensor] | None = None
    for i in range(last):
        denoised, difficulty = estimate(x, sigma.to(x.dtype))
        place = next_place(place, i, last, delta, lead(difficulty))
        sigma_next = sigma_at(place, grid)
        h = (sigma / sigma_next).log()
        extrapolated = denoised
        if previous is not None:
            ratio = (h / previous[1].clamp_min(1e-12)).clamp(max=MAX_RATIO)
            extrapolated = denoised + pixels(ratio / 2) * (denoised - previous[0])
        keep = -torch.expm1(-2 * h)  # 1 - (s'/s)^2
        x = pixels(1 - keep) * x + pixels(keep) * extrapolated + pixels(sigma_next * keep.sqrt()) * draw(i)
        previous, sigma = (denoised, h), sigma_next
    return estimate(x, sigma.to(x.dtype))[0]


def region_denoiser(
    denoiser: Denoiser, text: Conditioning, guidance: float = 1.0, interval: tuple[float, float] = (0.0, 0.0)
) -> RegionDenoiser:
    """`denoiser`, trained with regions, for the sampler above. With `guidance` other than 1, patches whose
    level, as the core sees it, lies within `interval` are guided by the estimate without captions (two
    calls)."""
    assert denoiser.difficulty is not None, "this model was trained without regions"
    no_captions = text.drop_captions()

    def estimate(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised, features = denoiser.estimate(z, sigma, text)
        assert denoiser.difficulty is not None
        h = denoiser.difficulty(features, denoiser.logvar(sigma))
        if guidance != 1:
            level = sigma * (sigma.shape[-1] * PATCH / z.shape[-1])
            inside = (interval[0] <= level) & (level <= interval[1])
            weight = torch.where(inside, guidance, 1.0)
            weight = expand(weight, z.shape[-1])
            guide_estimate = denoiser(z, sigma, no_captions)
            denoised = guide_estimate + weight * (denoised - guide_estimate)
        return denoised, h

    return estimate
