"""Images of a core or a fine-tuned model, in batches, by the snapshot's own sampler settings or others.

Refined models make theirs in pipeline/adversarial/few_step.py."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.early_exit import TileEarlyExit
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.samplers import ADAPTIVE
from pipeline.errors import ConfigError
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import SIGMA_DATA
from pipeline.models.shape import SQUARE, Shape
from pipeline.models.snapshot import Snapshot

BATCH = 16  # images at once; on a CPU a quarter faster than 64, at 128 px, and in a third of the memory
HALF_A_GREY_LEVEL = 0.5 / 127.5 * SIGMA_DATA  # in standardised pixels, times the standard deviation of pixels


class Generated(NamedTuple):
    """Images and the cost of each."""

    images: Tensor  # uint8 [N,3,R,R], or of another shape, on the CPU
    nfe: int  # denoiser calls for one image
    compute_fraction: float = 1.0  # of the work of the finest level; less than 1 with early exit


def in_batches(
    text: Conditioning, seeds: Sequence[int], batch_size: int
) -> Iterator[tuple[Conditioning, Sequence[int]]]:
    """Captions and seeds of each batch, in order."""
    for i in range(0, len(seeds), batch_size):
        yield text.select(slice(i, i + batch_size)), seeds[i : i + batch_size]


def generate(
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    settings: SamplerSettings | None = None,
    batch_size: int = BATCH,
    steps: Sequence[int] | None = None,
    shape: Shape = SQUARE,
) -> Generated:
    """Make one image of `shape` a caption and seed with a core or a fine-tuned model; `settings` None is the
    snapshot's own. `steps` are those of each level, core first (see `schedule.grids`), in place of their number.

    With `early_exit` tiles leave the computation once their predicted error is half a grey level. Raises
    ConfigError where the snapshot lacks the weights of its guide, or cannot be sampled by ADAPTIVE."""
    settings = settings or snapshot.config.sampling
    if settings.guide == "early_weights" and snapshot.early is None:
        fix = "choose another, or train with pretrain.early_images and finetune.early_images"
        raise ConfigError(
            "E-CFG-047", "guide", "'early_weights' needs weights that this model does not have", fix
        )
    if settings.sampler == ADAPTIVE:
        check_adaptive(snapshot, settings)
    device = next(snapshot.denoiser.parameters()).device
    tolerance = HALF_A_GREY_LEVEL / max(snapshot.statistics.std)
    early_exit = TileEarlyExit(tolerance) if settings.early_exit else None
    images, nfe = [], 0
    for part, rows in in_batches(text, seeds, batch_size):
        x, nfe = sample_pyramid(
            snapshot.denoiser,
            part.to(device),
            rows,
            settings,
            snapshot.early,
            early_exit,
            steps=steps,
            shape=shape,
        )
        images.append(snapshot.to_pixels(x).cpu())
    return Generated(torch.cat(images), nfe, early_exit.compute_fraction if early_exit else 1.0)


def check_adaptive(snapshot: Snapshot, settings: SamplerSettings) -> None:
    """Raise ConfigError where a model cannot be sampled by ADAPTIVE with these settings."""
    if snapshot.denoiser.difficulty is None:
        problem = "'adaptive' needs a model that was trained with regions"
        fix = "choose another, or train with regions.probability above 0"
        raise ConfigError("E-CFG-048", "sampler", problem, fix)
    if settings.guide != "unconditional":
        problem = f"{settings.guide!r} cannot guide the adaptive sampler"
        raise ConfigError("E-CFG-049", "guide", problem, "choose unconditional, or another sampler")
    if settings.early_exit:
        problem = "'adaptive' has no early exit, which this model's sampling.early_exit asks for"
        raise ConfigError("E-CFG-053", "sampler", problem, "choose another sampler")
