"""Images of models that are not refined, by the snapshot's own defaults. Refined ones: adversarial/few_step.py."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.early_exit import TileEarlyExit
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.samplers import ADAPTIVE
from pipeline.errors import ConfigError
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import SIGMA_DATA
from pipeline.models.snapshot import Snapshot

HALF_A_GREY_LEVEL = 0.5 / 127.5 * SIGMA_DATA  # of standardised pixels, times their standard deviation


class Generated(NamedTuple):
    """Images and what each cost."""

    images: Tensor  # uint8 [N,3,R,R] on the CPU
    nfe: int  # denoiser calls for one image
    share: float = 1.0  # of the work of its finest level that was done; less than 1 where tiles were finished


def in_batches(
    text: Conditioning, seeds: Sequence[int], batch_size: int
) -> Iterator[tuple[Conditioning, Sequence[int]]]:
    """Captions and seeds of each batch, in order."""
    for i in range(0, len(seeds), batch_size):
        yield text.select(slice(i, i + batch_size)), seeds[i : i + batch_size]


@torch.no_grad()
def generate(
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    num_steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 64,
    sampler: str | None = None,
    guide: str | None = None,
) -> Generated:
    """Make one image a caption and seed with a core or a fine-tuned model, by the snapshot's own defaults.

    `num_steps` is the number of steps of `sampler` (one of SAMPLERS, or ADAPTIVE), guided by `guide` (one of
    GUIDES). Raises ConfigError where the snapshot lacks the weights of its guide, or was not trained or set for its
    sampler. The snapshot says whether tiles are finished early (`finish`), once their predicted error is half a
    grey level."""
    # Older snapshots do not name these.
    sampling = {"sampler": "heun", "guide": "no_text", "finish": False, **snapshot.config["sampling"]}
    guide = guide or sampling["guide"]
    if guide == "early" and snapshot.early is None:
        fix = "choose another, or train with pretrain.early_images and finetune.early_images"
        raise ConfigError("E-CFG-047", "guide", "'early' needs weights that this model does not have", fix)
    sampler = sampler or sampling["sampler"]
    if sampler == ADAPTIVE:
        check_adaptive(snapshot, guide, sampling["finish"])
    device = next(snapshot.denoiser.parameters()).device
    finish = TileEarlyExit(HALF_A_GREY_LEVEL / max(snapshot.statistics.std)) if sampling["finish"] else None
    images, nfe = [], 0
    for part, rows in in_batches(text, seeds, batch_size):
        x, nfe = sample_pyramid(
            snapshot.denoiser,
            part.to(device),
            rows,
            num_steps or sampling["num_steps"],
            sampling["guidance"] if guidance is None else guidance,
            tuple(sampling["guidance_interval"]),
            sampling["lift"],
            sampler=sampler,
            guide=guide,
            early=snapshot.early,
            finish=finish,
        )
        images.append(snapshot.statistics.to_uint8(x).cpu())
    return Generated(torch.cat(images), nfe, finish.share if finish else 1.0)


def check_adaptive(snapshot: Snapshot, guide: str, finish: bool) -> None:
    """Raise ConfigError where a model cannot be sampled by ADAPTIVE as it is set."""
    if snapshot.denoiser.difficulty is None:
        fix = "choose another, or train with regions.probability above 0"
        raise ConfigError(
            "E-CFG-048", "sampler", "'adaptive' needs a model that was trained with regions", fix
        )
    if guide != "no_text":
        problem = f"{guide!r} cannot guide the adaptive sampler"
        raise ConfigError("E-CFG-049", "guide", problem, "choose no_text, or another sampler")
    if finish:
        problem = "'adaptive' cannot finish tiles early, as this model's sampling.finish asks"
        raise ConfigError("E-CFG-053", "sampler", problem, "choose another sampler")
