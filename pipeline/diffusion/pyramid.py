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
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.samplers import ADAPTIVE, History, integrate
from pipeline.diffusion.seeds import seeded_noise, step_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import PATCH, Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, upsample


def to_next_octave(low: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """From [B,3,R,R] at noise level sigma/2 to [B,3,2R,2R] at sigma: U low + HP(sigma noise).

    The noise of the result is exactly white; only the high band of the image is missing, so sigma must be
    several times its size."""
    return upsample(low) + high_pass(sigma * noise)


def handover_of(handover: Sequence[float], octave: int) -> float:
    """The handover to shell number `octave`, 0 the coarsest: `handover` holds one for all shells, or one
    each."""
    return handover[min(octave, len(handover) - 1)]


def num_steps_before_handover(above: ShellDenoiser, top: int, sigmas: Tensor, handover: float) -> int:
    """How many steps of the grid `sigmas`, in units of the resolution `top`, come before the handover to
    `above`: until the noise is `handover` times the RMS of its high band, and at least one."""
    start = handover * above.sigma_high_band * top / above.resolution
    return max(int((sigmas > start).sum()), 1)


def split_grid(
    pyramid: Sequence[Denoiser], settings: SamplerSettings, sigma_max: float = 80.0, sigma_min: float = 0.002
) -> list[Tensor]:
    """Noise levels of each level of a pyramid, core first, in units of the top resolution R: one grid of
    `num_steps` from sigma_max * R / R_core to sigma_min and 0, split where the shells take over."""
    top, core = pyramid[-1].resolution, pyramid[0].resolution
    sigmas = karras_sigmas(settings.num_steps, sigma_max * top / core, sigma_min)
    grids = []
    for i, above in enumerate(pyramid[1:]):
        assert isinstance(above, ShellDenoiser)
        n = num_steps_before_handover(above, top, sigmas, handover_of(settings.handover, i))
        grids.append(sigmas[: n + 1])
        sigmas = sigmas[n:]
    return [*grids, sigmas]


def grid_of_steps(
    pyramid: Sequence[Denoiser],
    steps: Sequence[int],
    handover: Sequence[float],
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
) -> list[Tensor]:
    """As `split_grid`, for a number of steps (at least 1) of each level: Karras levels between its handovers,
    which are always levels of the grid."""
    top, core = pyramid[-1].resolution, pyramid[0].resolution
    starts = [sigma_max * top / core]
    for i, above in enumerate(pyramid[1:]):
        assert isinstance(above, ShellDenoiser)
        starts.append(handover_of(handover, i) * above.sigma_high_band * top / above.resolution)
    coarse = [
        karras_sigmas(n + 1, start, end)[:-1]
        for n, start, end in zip(steps[:-1], starts[:-1], starts[1:], strict=True)
    ]
    return [*coarse, karras_sigmas(steps[-1], starts[-1], sigma_min)]


@torch.no_grad()
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
) -> tuple[Tensor, int]:
    """Sample coarse to fine, one image a seed and caption.

    The grid of noise levels is that of `split_grid`; with `steps`, those of each level, that of
    `grid_of_steps`. Each shell of the pyramid takes over at its handover, and goes on with the history of a
    multistep method. A handover needs one noise level everywhere, so ADAPTIVE, for models trained with
    regions, lets levels differ on the finest level of the pyramid only, where it starts without history; its
    guide is `unconditional`.

    `early` is the same pyramid with early weights, for the guide of that name. `early_exit` carries out
    `settings.early_exit` on the finest level, and counts what was computed (not for ADAPTIVE).

    Returns (standardised images [N,3,R,R], denoiser calls an image)."""
    draw = seeded_noise(seeds, text.pooled.device)
    pyramid = pyramid_levels(denoiser)
    guides = pyramid_levels(early) if early else [None] * len(pyramid)
    core, top = pyramid[0], denoiser.resolution
    if steps is None:
        grids = split_grid(pyramid, settings, sigma_max, sigma_min)
    else:
        grids = grid_of_steps(pyramid, steps, settings.handover, sigma_max, sigma_min)
    x = draw("noise", core.resolution) * float(grids[0][0]) * core.resolution / top
    nfe, history = 0, History()
    for i, (level, sigmas) in enumerate(zip(pyramid, grids, strict=True)):
        unit = level.resolution / top  # sigma here = sigma at the top * unit
        noise = partial(step_noise, draw, level.resolution)
        finest = level is denoiser
        if finest and settings.sampler == ADAPTIVE:
            estimate = region_denoiser(level, text, settings.guidance, settings.guidance_interval)
            patch = PATCH * level.resolution // core.resolution
            x = sde_dpmpp_2m_adaptive(estimate, x, sigmas * unit, noise, patch)
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
            guided.denoiser = tiles = ActiveTiles(level, len(x), early_exit)
            denoise = tiles.with_exit(guided)
        x = integrate(settings.sampler, denoise, x, sigmas * unit, text, noise, history)
        nfe += guided.nfe
        if not finest:
            history.upsample()
            fresh = draw(f"lift-{2 * level.resolution}", 2 * level.resolution)
            x = to_next_octave(x, float(sigmas[-1]) * 2 * unit, fresh)
    return x, nfe
