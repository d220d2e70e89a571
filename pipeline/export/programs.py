"""What is exported: modules of tensors alone, from the tokens of a prompt to an image.

`ImageProgram` is the sampling loop of a model, unrolled for one number of passes or steps. Its random numbers are
an input, so that two programs can be compared number by number. `TextProgram` is the text encoder behind its
tokenizer.

Shapes: N images of R px, T tokens of D numbers, K random numbers an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.adversarial.few_step import few_step
from pipeline.diffusion.pyramid import descend
from pipeline.diffusion.samplers import ADAPTIVE
from pipeline.diffusion.schedule import grids
from pipeline.diffusion.seeds import Draw
from pipeline.errors import ConfigError
from pipeline.inference.upscaling import to_grey
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.snapshot import Snapshot
from pipeline.text import bert
from pipeline.text.minilm import NUM_HEADS, NUM_LAYERS, MiniLM

Sample = Callable[[Conditioning, Draw], Tensor]  # standardised images [N,3,R,R]


class Noise(NamedTuple):
    """A draw of standard normal numbers [N,3,R,R]: what it is for, and R."""

    purpose: str
    resolution: int


class ImageProgram(nn.Module):
    """Encoded prompts and noise to images."""

    def __init__(self, snapshot: Snapshot, steps: int | None = None) -> None:
        """steps: passes of a refined model (None: its fewest), sampler steps of others (None: their own).

        Raises ConfigError for a model that decides by the image, or by its noise level, how it goes on."""
        super().__init__()
        self.denoiser = snapshot.denoiser  # holds the weights
        self._statistics, self._contrast = snapshot.statistics, snapshot.config.contrast
        self._sample = (refined if snapshot.config.is_refined else unrefined)(snapshot, steps)
        self.noise = draws(self._sample, snapshot.config.text_dim)

    @property
    def sizes(self) -> list[int]:
        """How many of the K numbers each draw takes."""
        return [3 * each.resolution**2 for each in self.noise]

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Grey levels 0 to 255, not rounded, float32 [N,3,R,R].

        pooled [N,D], tokens [N,T,D] and mask [N,T]: as `TextEncoder.encode` gives them.
        noise [N,K]: standard normal, the draws of `self.noise` one after the other."""
        parts = iter(noise.split(self.sizes, dim=1))

        def draw(purpose: str, resolution: int) -> Tensor:
            return next(parts).unflatten(1, (3, resolution, resolution))

        images = self._sample(Conditioning(pooled, tokens, mask), draw)
        return to_grey(self._contrast * images, self._statistics).clamp(0, 255)


def refined(snapshot: Snapshot, passes: int | None) -> Sample:
    """The few passes of a refined model."""
    config = snapshot.config
    assert config.sigma_start is not None, "not a refined model"
    number, sigma_start = passes or min(config.passes), config.sigma_start
    return lambda text, draw: few_step(snapshot.denoiser, text, draw, number, sigma_start)[-1]


def unrefined(snapshot: Snapshot, steps: int | None) -> Sample:
    """The sampler of another model, without early exit. Raises ConfigError, see `ImageProgram`."""
    settings, fix = snapshot.config.sampling, "export a refined model: --model models/refined"
    if settings.sampler == ADAPTIVE:
        raise ConfigError("E-CFG-088", "export", "the adaptive sampler takes its steps by the image", fix)
    if settings.guidance != 1:
        problem = f"this model is sampled with a guidance of {settings.guidance}, which is not part of it"
        raise ConfigError("E-CFG-089", "export", problem, fix)
    settings = dataclasses.replace(
        settings, num_steps=steps or settings.num_steps, guide="unconditional", early_exit=False
    )
    levels = grids(pyramid_levels(snapshot.denoiser), settings)
    visited = [sigmas.tolist() for sigmas in levels]
    return lambda text, draw: descend(snapshot.denoiser, text, draw, visited, settings)[0]


@torch.no_grad()
def draws(sample: Sample, dim: int) -> list[Noise]:
    """What a run draws, in order."""
    made: list[Noise] = []

    def draw(purpose: str, resolution: int) -> Tensor:
        made.append(Noise(purpose, resolution))
        return torch.zeros(1, 3, resolution, resolution)

    mask = torch.zeros(1, 1, dtype=torch.bool)
    sample(Conditioning(torch.zeros(1, dim), torch.zeros(1, 1, dim), mask), draw)
    return made


class TextProgram(nn.Module):
    """Tokens of prompts to vectors, as MiniLM's `encode` makes them."""

    def __init__(self, encoder: MiniLM) -> None:
        super().__init__()
        used = (name for name in encoder.weights if not name.startswith("pooler"))
        self._names = {name: name.replace(".", "_") for name in used}
        for name, buffer in self._names.items():
            self.register_buffer(buffer, encoder.weights[name])

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids int64 [N,T] and where there are any, bool [N,T], to pooled [N,D] and tokens [N,T,D]; zeros for
        an empty prompt, of no tokens."""
        weights = {name: self.get_buffer(buffer) for name, buffer in self._names.items()}
        attended = mask | ~mask.any(dim=1, keepdim=True)
        hidden = bert.encode(weights, ids, attended, NUM_LAYERS, NUM_HEADS) * mask[..., None]
        mean = hidden.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean, dim=1), hidden
