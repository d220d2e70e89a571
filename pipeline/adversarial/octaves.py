"""The power of each octave of a refined model, set to that of real images.

Averaging weights blurs, and distances between sorted values of small batches are least for samples with a little
less variety than real ones; both leave fine detail a few percent too weak. One factor a shell mends that after
training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.adversarial.few_step import few_step
from pipeline.diffusion.generate import BATCH
from pipeline.diffusion.seeds import seeded_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.resample import high_pass, rescale
from pipeline.models.shape import Images, Shape, by_size, mean_over
from pipeline.models.snapshot import Snapshot
from pipeline.training.distributed import merged, own_share

MAX_FACTOR = 1.1  # and its inverse: an octave that is further off is wrong in other ways, and left as it is


@torch.no_grad()
def match_octaves(
    snapshot: Snapshot, real: Images, text: Conditioning, seeds: Sequence[int]
) -> dict[int, float]:
    """Scale what each shell adds, coarse to fine, so that its octave has the mean power that it has in `real`.

    real: N standardised images of the captions. Power is the mean over the N images, one sample of each
    caption and seed in every number of passes that the model has. Returns the factors by resolution: 1 for an
    octave that is off by more than MAX_FACTOR."""
    factors, groups = {}, by_size(real)
    for level in pyramid_levels(snapshot.denoiser)[1:]:
        assert isinstance(level, ShellDenoiser)
        bands = [high_pass(rescale(alike, level.resolution)) for _, alike in groups]
        wanted = mean_over([(band.square().mean(), len(band)) for band in bands])
        shapes = [(places, Shape.of(alike, snapshot.resolution)) for places, alike in groups]
        powers = [
            sampled_power(level, snapshot, text, seeds, passes, shapes) for passes in snapshot.config.passes
        ]
        factor = float((wanted.double().cpu() / torch.stack(powers).mean()).sqrt())
        if not 1 / MAX_FACTOR <= factor <= MAX_FACTOR:
            factor = 1.0
        level.net.out_gain.mul_(factor)
        factors[level.resolution] = factor
    return factors


def sampled_power(
    level: Denoiser,
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    passes: int,
    shapes: Sequence[tuple[Sequence[int], Shape]],
) -> Tensor:
    """Mean square of the high band of samples of a level, in the range of pixels: float64 scalar.

    shapes: places of the samples of each shape."""
    sigma, device = snapshot.config.sigma_start, next(level.parameters()).device
    assert sigma is not None, "not a refined model"
    own: dict[int, Tensor] = {}
    for places, shape in own_batches(shapes):
        part = text.select(torch.tensor(places)).to(device)
        draw = seeded_noise([seeds[place] for place in places], device, shape)
        drawn = few_step(level, part, draw, passes, sigma)[-1]
        samples = snapshot.statistics.standardise(snapshot.to_pixels(drawn))
        own |= zip(places, high_pass(samples).square().mean(dim=(1, 2, 3)).double().cpu(), strict=True)
    powers = merged(own)
    return torch.stack([powers[place] for place in range(len(seeds))]).mean()


def own_batches(shapes: Sequence[tuple[Sequence[int], Shape]]) -> Sequence[tuple[Sequence[int], Shape]]:
    """Places of samples of each shape, in batches: those that this worker makes. Which one makes them changes no
    bit of them."""
    batches = [
        (places[i : i + BATCH], shape) for places, shape in shapes for i in range(0, len(places), BATCH)
    ]
    return own_share(batches)
