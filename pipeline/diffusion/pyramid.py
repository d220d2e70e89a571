"""Sampling a pyramid coarse to fine.

The core is sampled first. Once the noise has fallen to a multiple of a shell's high band, the state is
enlarged, fresh white noise fills its high band, and the shell goes on, exactly as it was trained (the pooling
identity, pipeline/models/denoiser.py). Every image has a seed of its own: it depends on its batch by rounding
alone.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.diffusion.adaptive import region_denoiser, sde_dpmpp_2m_adaptive
from pipeline.diffusion.early_exit import ActiveTiles, TileEarlyExit
from pipeline.diffusion.guidance import Denoise, Guided, guide_of
from pipeline.diffusion.samplers import ADAPTIVE, History, integrate
from pipeline.diffusion.schedule import grids
from pipeline.diffusion.seeds import Draw, seeded_noise, step_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import PATCH, Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, upsample
from pipeline.models.shape import SQUARE, Shape


def to_next_octave(low: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """From [B,3,R,R] at noise level sigma/2 to [B,3,2R,2R] at sigma: U low + HP(sigma noise).

    The noise of the result is exactly white; only the high band of the image is missing, so sigma must be
    several times its size."""
    return upsample(low) + high_pass(sigma * noise)


def sample_pyramid(
    denoiser: Denoiser,
    text: Conditioning,
    seeds: Sequence[int],
    settings: SamplerSettings,
    early: Denoiser | None = None,
    early_exit: TileEarlyExit | None = None,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    steps: Sequence[int] | None = None,
    shape: Shape = SQUARE,
) -> tuple[Tensor, int]:
    """Sample coarse to fine, one image of `shape` a seed and caption.

    `schedule.grids` gives the noise levels; with `steps` those of each level, in place of their number. Each
    shell of the pyramid takes over at its handover, and goes on with the history of a multistep method. A
    handover needs one noise level everywhere, so ADAPTIVE, for models trained with regions, lets levels differ
    on the finest level of the pyramid only, where it starts without history; its guide is `unconditional`.

    `early` is the same pyramid with early weights, for the guide of that name. `early_exit` carries out
    `settings.early_exit` on the finest level, and counts what was computed (not for ADAPTIVE).

    Returns (standardised images [N,3,H,W], denoiser calls an image)."""
    draw = seeded_noise(seeds, text.pooled.device, shape)
    levels = grids(pyramid_levels(denoiser), settings, steps, sigma_max, sigma_min)
    visited = [sigmas.tolist() for sigmas in levels]
    return descend(denoiser, text, draw, visited, settings, early, early_exit)


@torch.no_grad()
def descend(
    denoiser: Denoiser,
    text: Conditioning,
    draw: Draw,
    visited: Sequence[Sequence[float]],
    settings: SamplerSettings,
    early: Denoiser | None = None,
    early_exit: TileEarlyExit | None = None,
) -> tuple[Tensor, int]:
    """`sample_pyramid` from given noise, down the levels `visited` (`schedule.grids`)."""
    pyramid = pyramid_levels(denoiser)
    guides = pyramid_levels(early) if early else [None] * len(pyramid)
    core, top = pyramid[0], denoiser.resolution
    x = draw("noise", core.resolution) * visited[0][0] * core.resolution / top
    nfe, history = 0, History()
    for i, (level, sigmas) in enumerate(zip(pyramid, visited, strict=True)):
        unit = level.resolution / top  # sigma here = sigma at the top * unit
        own = [sigma * unit for sigma in sigmas]
        noise = partial(step_noise, draw, level.resolution)
        finest = level is denoiser
        if finest and settings.sampler == ADAPTIVE:
            estimate = region_denoiser(level, text, settings.guidance, settings.guidance_interval)
            patch = PATCH * level.resolution // core.resolution
            x = sde_dpmpp_2m_adaptive(estimate, x, torch.tensor(own, dtype=torch.float64), noise, patch)
            return x, nfe + (len(sigmas) - 1) * (1 if settings.guidance == 1 else 2)
        guided = Guided(
            level,
            settings.guidance,
            settings.guidance_interval,
            core.resolution / level.resolution,
            guide_of(settings.guide, level, guides[i]),
        )
        denoise: Denoise = guided
        if finest and early_exit is not None and isinstance(level, ShellDenoiser):
            guided.denoiser = tiles = ActiveTiles(level, len(x), x.shape[2:], early_exit)
            denoise = tiles.with_exit(guided)
        x = integrate(settings.sampler, denoise, x, own, text, noise, history)
        nfe += guided.nfe
        if not finest:
            history.upsample()
            fresh = draw(f"lift-{2 * level.resolution}", 2 * level.resolution)
            x = to_next_octave(x, sigmas[-1] * 2 * unit, fresh)
    return x, nfe
