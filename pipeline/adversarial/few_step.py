"""Images of a refined model in one, two or four network passes.

The core denoises from one noise level and, with more passes, re-noises and denoises its own estimate; each shell
adds its octave in one pass. Other models are sampled by diffusion/generate.py; `generate_images` chooses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.diffusion.generate import BATCH, Generated, generate, in_batches
from pipeline.diffusion.pyramid import to_next_octave
from pipeline.diffusion.seeds import Draw, seeded_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import SIGMA_DATA, CoreDenoiser, Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.shape import SQUARE, Shape
from pipeline.models.snapshot import Snapshot

HANDOVER = 8  # where a shell starts, over the RMS of its high band
PASS_SIGMAS = {1: (), 2: (0.8,), 4: (1.9, 0.8, 0.3)}  # core levels after the first, by number of passes


def pure_start(noise: Tensor, sigma: float) -> Tensor:
    """From standard normal noise a start without an image, of the variance of images with noise of level sigma."""
    return (sigma**2 + SIGMA_DATA**2) ** 0.5 * noise


def few_step(
    denoiser: Denoiser,
    text: Conditioning,
    draw: Draw,
    passes: int,
    sigma_start: float,
    start: Tensor | None = None,
) -> list[Tensor]:
    """Sample a refined model in `passes` calls: the estimate [N,3,r,r] of every level, core first.

    The core starts from noise at sigma_start, re-noises and denoises its own estimate at the levels of
    PASS_SIGMAS, and each shell then adds its octave once, from pure noise in its high band. Training passes
    `start` [N,3,r,r], real images with noise. Gradients flow through the last core pass and the shells."""
    pyramid = pyramid_levels(denoiser)
    core = pyramid[0]
    assert isinstance(core, CoreDenoiser)
    if start is None:
        start = pure_start(draw("start", core.resolution), sigma_start)
    x = start
    schedule = (sigma_start, *PASS_SIGMAS[passes])
    for i, sigma in enumerate(schedule):
        s = torch.full((x.shape[0],), sigma, device=x.device)
        last = i + 1 == len(schedule)
        with torch.set_grad_enabled(torch.is_grad_enabled() and last):
            estimate = core.estimate(x, s, text)
        if not last:
            x = estimate.denoised + schedule[i + 1] * draw(f"pass-{i + 1}", core.resolution)
    estimates = [estimate.denoised]
    for shell in pyramid[1:]:
        assert isinstance(shell, ShellDenoiser)
        sigma = HANDOVER * shell.sigma_high_band
        noise = draw(f"shell-{shell.resolution}", shell.resolution)
        noisy = to_next_octave(estimate.denoised.detach(), sigma, noise)
        s = torch.full((x.shape[0],), sigma, device=x.device)
        estimate = shell.add_octave(noisy, estimate, s, text)
        estimates.append(estimate.denoised)
    return estimates


@torch.no_grad()
def generate_refined(
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    passes: int | None = None,
    batch_size: int = BATCH,
    shape: Shape = SQUARE,
) -> Generated:
    """One image of `shape` per caption and seed, in `passes` (one of the snapshot's; by default its fewest)."""
    config, device = snapshot.config, next(snapshot.denoiser.parameters()).device
    assert config.sigma_start is not None, "not a refined model"
    nfe, images = passes or min(config.passes), []
    for part, rows in in_batches(text, seeds, batch_size):
        draw = seeded_noise(rows, device, shape)
        x = few_step(snapshot.denoiser, part.to(device), draw, nfe, config.sigma_start)[-1]
        images.append(snapshot.to_pixels(x).cpu())
    return Generated(torch.cat(images), nfe)


def generate_images(
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    settings: SamplerSettings | None = None,
    passes: int | None = None,
    batch_size: int = BATCH,
    shape: Shape = SQUARE,
) -> Generated:
    """`generate_refined` in `passes`, or `generate` by `settings`, by the kind of the model."""
    if snapshot.config.is_refined:
        return generate_refined(snapshot, text, seeds, passes, batch_size, shape)
    return generate(snapshot, text, seeds, settings, batch_size, shape=shape)
