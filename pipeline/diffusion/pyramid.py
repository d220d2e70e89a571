"""Samplers: from noise to images, counting every denoiser call (NFE).

Heun's method of Karras et al. (arXiv 2206.00364, algorithm 1) and DPM++(2M) for the deterministic path,
SDE-DPM++(2M) (both Lu et al., arXiv 2211.01095) for the stochastic one; coarse to fine, a trained pyramid is
sampled at low resolution first and lifted by fresh white noise in the high band; a refined model makes an image
in one, two or four passes. All state is float32 or better. Every image has a seed of its own, so that it depends on
the batch it was made in by rounding alone, and not at all among batches of one size (`registry.generator`).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.diffusion.adaptive import region_denoiser, sde_dpmpp_2m_adaptive
from pipeline.diffusion.early_exit import ActiveTiles, TileEarlyExit
from pipeline.diffusion.guidance import Guided, guide_of
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.samplers import ADAPTIVE, History, integrate
from pipeline.diffusion.seeds import seeded_noise, step_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import PATCH, Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, upsample


def to_next_octave(low: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """From [B,3,R,R] at noise level sigma/2 to [B,3,2R,2R] at sigma: U low + HP(sigma noise).

    The noise of the result is exactly white; only the high band of the image is missing, so sigma must be
    several times its size."""
    return upsample(low) + high_pass(sigma * noise)


def handover_of(lift_at: float | Sequence[float], octave: int) -> float:
    """The lift to shell number `octave`, 0 the coarsest: of one number for all, or one a shell."""
    lifts = [lift_at] if isinstance(lift_at, float | int) else lift_at
    return lifts[min(octave, len(lifts) - 1)]


def num_steps_before_handover(above: ShellDenoiser, top: int, sigmas: Tensor, lift_at: float) -> int:
    """How many steps of the grid `sigmas`, in units of the resolution `top`, come before the lift to `above`: until
    the noise is `lift_at` times the size of its high band, and at least one."""
    start = lift_at * above.sigma_high_band * top / above.resolution
    return max(int((sigmas > start).sum()), 1)


@torch.no_grad()
def sample_pyramid(
    denoiser: Denoiser,
    text: Conditioning,
    seeds: Sequence[int],
    num_steps: int,
    guidance: float,
    interval: tuple[float, float],
    lift_at: float | Sequence[float],
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    sampler: str = "heun",
    guide: str = "no_text",
    early: Denoiser | None = None,
    finish: TileEarlyExit | None = None,
) -> tuple[Tensor, int]:
    """Sample coarse to fine with one of SAMPLERS or ADAPTIVE, guided by one of GUIDES (`early`: the early weights).

    One grid of `num_steps` levels runs from sigma_max * R / R_core to sigma_min, in units of the top
    resolution; each shell of the pyramid takes over once sigma falls to `lift_at` (one number, or one a shell)
    times the size of its high band, and goes on with the history of a method of two steps. A lift needs one noise
    level everywhere, so that ADAPTIVE, for models trained with regions, lets levels differ on the finest level of
    the pyramid only, where it begins anew, and its guide is `no_text`. There, too, finished tiles leave the
    computation (`finish`, which counts what is left; all samplers but ADAPTIVE).

    Returns (standardised images [N,3,R,R], denoiser calls an image)."""
    draw = seeded_noise(seeds, text.pooled.device)
    pyramid = pyramid_levels(denoiser)
    guides = pyramid_levels(early) if early else [None] * len(pyramid)
    core = pyramid[0]
    top = denoiser.resolution
    sigmas = karras_sigmas(num_steps, sigma_max * top / core.resolution, sigma_min)
    x = draw("noise", core.resolution) * float(sigmas[0]) * core.resolution / top
    nfe, history = 0, History()
    for i, level in enumerate(pyramid):
        unit = level.resolution / top  # sigma here = sigma at the top * unit
        away = guide_of(guide, level, guides[i])
        guided = Guided(level, guidance, interval, core.resolution / level.resolution, away)
        noise = partial(step_noise, draw, level.resolution)
        above = pyramid[i + 1] if i + 1 < len(pyramid) else None
        if isinstance(above, ShellDenoiser):
            n = num_steps_before_handover(above, top, sigmas, handover_of(lift_at, i))
            x = integrate(sampler, guided, x, sigmas[: n + 1] * unit, text, noise, history)
            history.lift()
            x = to_next_octave(
                x, float(sigmas[n]) * 2 * unit, draw(f"lift-{above.resolution}", above.resolution)
            )
            sigmas = sigmas[n:]
        elif sampler == ADAPTIVE:
            estimate = region_denoiser(level, text, guidance, interval)
            patch = PATCH * level.resolution // core.resolution
            x = sde_dpmpp_2m_adaptive(estimate, x, sigmas * unit, noise, patch)
            nfe += (len(sigmas) - 1) * (1 if guidance == 1 else 2)
        elif finish is not None and isinstance(level, ShellDenoiser):
            guided.denoiser = tiles = ActiveTiles(level, len(x), finish)
            x = integrate(sampler, tiles.finishing(guided), x, sigmas * unit, text, noise, history)
        else:
            x = integrate(sampler, guided, x, sigmas * unit, text, noise, history)
        nfe += guided.nfe
    return x, nfe
