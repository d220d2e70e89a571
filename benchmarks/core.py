"""The demo's core against a plain recipe at equal seconds: held-out error and KID.

    python -m benchmarks.core [--seconds 240] [--threads 2] [--data data/prepared]

The plain recipe is a magnitude-preserving U-Net (1.8 million parameters) that works on single pixels, with
batches of 64 and EDM2's 1/sqrt learning rate. Both train on the same images, one after the other in one process;
schedules are fitted to the seconds by a short run before. Held-out error is the denoising error on the test split,
over one noise law for both; KID is on random features (`randconv`), over samples of the held-out captions.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.judging import compare, kids, whitened
from benchmarks.measure import table
from pipeline.config.params import load_params
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.statistics import measure_statistics
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.evaluation.features import randconv
from pipeline.models.config import SamplerSettings
from pipeline.models.counting import count_parameters
from pipeline.models.denoiser import build_core, set_dtype
from pipeline.training.denoising import DenoisingSettings, DenoisingStep, held_out_error
from pipeline.training.levels import ema_decays
from pipeline.training.numerics import precision
from pipeline.training.schedule import linear_decay_lr
from pipeline.training.state import Learner

RESOLUTION = 32
WARMUP = 640  # images
HELD_OUT_LAW = (-0.85, 1.6)  # between the two recipes' own
SAMPLES = 4  # a held-out caption
SETTINGS = SamplerSettings(16, guidance=1.5, guidance_interval=(0.3, 5.0))

Schedule = Callable[[float, int, int, int], float]  # (peak, nimg, num_images, warmup) -> rate


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    name: str
    net: dict[str, Any]
    batch_size: int
    lr: float
    schedule: Schedule
    p_mean: float
    p_std: float


def recipes() -> list[Recipe]:
    """The demo's, from params.yaml, and the plain one."""
    p = load_params()
    own = p.core.model_dump(mode="json", exclude={"resolution"})
    stage = p.pretrain
    plain = {"patch": 1, "channels": 24, "channel_mult": [1, 2, 5], "num_blocks": 1, "attention": [8]}
    rate = 0.010 * math.sqrt(192 / 24 * 64 / 2048)
    return [
        Recipe("demo", own, stage.batch_size, stage.lr, linear_decay_lr, stage.p_mean, stage.p_std),
        Recipe("plain", plain, 64, rate, sqrt_decay_lr, -1.1, 1.6),
    ]


def sqrt_decay_lr(peak: float, nimg: int, num_images: int, warmup: int) -> float:
    """EDM2's schedule (2312.02696, eq. 67): 1/sqrt from 30% of the images."""
    return peak * min((nimg + 1) / warmup, 1.0) / math.sqrt(max(nimg / (0.3 * num_images), 1.0))


def draw_sigma(p_mean: float, p_std: float, batch: int, generator: torch.Generator) -> Tensor:
    """ln sigma ~ N(p_mean, p_std^2)."""
    return lognormal_sigma(batch, p_mean, p_std, generator)


class Trainer:
    """One recipe on one data set."""

    def __init__(self, recipe: Recipe, dataset: PreparedDataset, num_images: int) -> None:
        torch.manual_seed(0)
        self.recipe, self.dataset, self.num_images, self.nimg = recipe, dataset, num_images, 0
        self.denoiser = build_core(RESOLUTION, int(str(dataset.text_encoder["dim"])), recipe.net)
        set_dtype(self.denoiser, precision("auto", torch.device("cpu")))
        self.learner = Learner(self.denoiser, (0.9, 0.99), ema_decays([0.05]))
        self.step = DenoisingStep(
            denoiser=self.denoiser,
            batches=Batches(dataset, "train", 0, recipe.batch_size, 1, RESOLUTION),
            statistics=measure_statistics(dataset, RESOLUTION),
            draw_sigma=partial(draw_sigma, recipe.p_mean, recipe.p_std),
            settings=DenoisingSettings(
                seed=0,
                batch_size=recipe.batch_size,
                shards=1,
                lr=recipe.lr,
                warmup_images=WARMUP,
                num_images=num_images,
                text_dropout=0.1,
            ),
        )

    def run(self, seconds: float) -> None:
        """Train until the time is up, or the images of the schedule are."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and self.nimg < self.num_images:
            self.step.shard_loss(self.nimg, 0)[0].backward()
            rate = self.recipe.schedule(self.recipe.lr, self.nimg, self.num_images, WARMUP)
            self.learner.update(rate, self.nimg, self.recipe.batch_size)
            self.nimg += self.recipe.batch_size

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """(held-out error, KID) of the averaged weights."""
        test, val = self.dataset.split("test"), self.dataset.split("val")
        text = self.dataset.text([self.dataset.caption_of(int(row)) for row in test])
        images = self.step.standardise(self.dataset.low_images(test))
        self.denoiser.eval()
        with self.learner.using(self.learner.emas["0.05"]):
            law = partial(draw_sigma, *HELD_OUT_LAW)
            error = held_out_error(self.denoiser, [(images, text)], law, 0, repeats=8)
            samples = [self._sample(text, range(k * len(test), (k + 1) * len(test))) for k in range(SAMPLES)]
        real = to_uint8(self.dataset.low_images(np.concatenate([test, val])))
        training = to_uint8(self.dataset.low_images(self.dataset.split("train")))
        features = whitened([randconv(RESOLUTION)], training)
        return error, kids(features, real, torch.cat(samples))["randconv"]

    def _sample(self, text: Any, seeds: range) -> Tensor:
        x, _ = sample_pyramid(self.denoiser, text, seeds, SETTINGS)
        return self.step.statistics.to_uint8(x)


class Trained(NamedTuple):
    """A recipe's network after training: what it holds and has seen, and its quality."""

    parameters: int
    images: int
    seconds: float
    error: float  # of held-out images
    kid: float


def to_uint8(images: Tensor) -> Tensor:
    """Grey levels, rounded."""
    return images.round().clamp(0, 255).to(torch.uint8)


def images_in(recipe: Recipe, dataset: PreparedDataset, seconds: float) -> int:
    """How many images the recipe sees in that time, from the rate of a ten-second run."""
    trial = Trainer(recipe, dataset, 10**9)
    trial.run(3)
    before, start = trial.nimg, time.perf_counter()
    trial.run(10)
    rate = (trial.nimg - before) / (time.perf_counter() - start)
    return int(rate * seconds) // recipe.batch_size * recipe.batch_size


def train(recipe: Recipe, dataset: PreparedDataset, seconds: float) -> Trained:
    """Train for about `seconds`, and measure."""
    trainer = Trainer(recipe, dataset, images_in(recipe, dataset, seconds))
    start = time.perf_counter()
    trainer.run(2 * seconds)  # the schedule ends it
    took = time.perf_counter() - start
    parameters = count_parameters(trainer.denoiser)
    return Trained(parameters, trainer.nimg, took, *trainer.measure())


def cells(name: str, trained: Trained, _: float) -> list[str]:
    """A line of the table."""
    return [
        name,
        f"{trained.parameters:,}",
        f"{trained.images:,}",
        f"{trained.seconds:.0f}",
        f"{trained.error:.4f}",
        f"{trained.kid:.2f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = PreparedDataset(args.data)
    lines, _ = compare({each.name: partial(train, each, dataset, args.seconds) for each in recipes()}, cells)
    print(table(["core", "parameters", "images", "seconds", "held-out error", "KID"], lines))


if __name__ == "__main__":
    main()
