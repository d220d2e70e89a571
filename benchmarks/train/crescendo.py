"""Our networks, trained as the stages do it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.train.settings import TEXT_DIM, TOKENS, Setting, Size
from pipeline.data.dataset import Batch
from pipeline.diffusion.ema import power_decay
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, build_core, build_shell, pyramid_levels, set_dtype
from pipeline.models.statistics import Statistics
from pipeline.training.denoising import DenoisingSettings, DenoisingStep
from pipeline.training.gradients import GradientSum
from pipeline.training.state import Learner, TrainState


class RandomBatches:
    """Random images and captions, always the same ones, in place of a data set."""

    def __init__(self, resolution: int, batch: int) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (batch, 3, resolution, resolution)
        self.images = torch.randint(256, shape, generator=random, dtype=torch.uint8)
        tokens = torch.randn(batch, TOKENS, TEXT_DIM, generator=random)
        self.text = Conditioning(tokens.mean(dim=1), tokens, torch.ones(batch, TOKENS, dtype=torch.bool))

    def at(self, nimg: int, shard: int) -> Batch:
        """The batch."""
        return Batch(self.images, 1, self.text, None)


def build_levels(size: Size) -> list[Denoiser]:
    """The core and its shells."""
    denoiser: Denoiser = build_core(size.core_resolution, TEXT_DIM, size.core)
    for shell in size.shells:
        denoiser = build_shell(denoiser, TEXT_DIM, 0.04, shell)
    return pyramid_levels(denoiser)


class Crescendo:
    """Our networks, and the steps of the stages that train them."""

    def __init__(self, size: Size, setting: Setting, recorded: bool = True, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.batch = setting.batch
        self.recorded, self.compiled = recorded and setting.device.type == "cuda", compiled
        self.levels = [level.to(setting.device) for level in build_levels(size)]
        set_dtype(self.levels[-1], setting.dtype)
        self.states = [TrainState({"net": self._learner(level)}) for level in self.levels]
        self.steps = [self._step(level, setting) for level in self.levels]

    def _learner(self, level: Denoiser) -> Learner:
        averages = {f"{std:g}": partial(power_decay, std) for std in (0.05, 0.10)}
        return Learner(nn.ModuleList([level.net, level.logvar]), (0.9, 0.99), averages)

    def _step(self, level: Denoiser, setting: Setting) -> DenoisingStep:
        return DenoisingStep(
            denoiser=level,
            batches=RandomBatches(setting.resolution, setting.batch),
            statistics=Statistics((0.0,) * 3, (0.6,) * 3),
            draw_sigma=lambda batch, generator: lognormal_sigma(batch, -0.8, 1.4, generator),
            settings=DenoisingSettings(
                seed=0,
                batch_size=setting.batch,
                shards=1,
                lr=0.01,
                warmup_images=0,
                num_images=10**12,
                text_dropout=0.1,
                recorded=self.recorded,
                compiled=self.compiled,
            ),
        )

    def step(self) -> None:
        """One update of every level."""
        for step, state in zip(self.steps, self.states, strict=True):
            step(state)
            state.nimg += self.batch

    def update(self) -> None:
        """What follows the gradient."""
        for state in self.states:
            learner = state.learners["net"]
            GradientSum([learner]).finish()
            learner.update(0.01, state.nimg, self.batch)

    def gradients(self) -> None:
        """Any gradient."""
        for state in self.states:
            state.learners["net"].grad.normal_()
