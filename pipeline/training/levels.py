"""Training of one or more levels of a pyramid, each by the denoising loss with a learner of its own.

This is the whole of the pretrain stage (one core) and one round of the finetune stage (new shells, and the levels
below where they keep learning). It wires what other files define: the step (denoising.py), the loop (fit.py), hooks
(hooks.py), and the choice of the weight average (averages.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.augment import Augment
from pipeline.data.degrade import Degrade, degrade
from pipeline.diffusion.contrast import match_contrast
from pipeline.diffusion.ema import power_decay
from pipeline.diffusion.generate import generate
from pipeline.diffusion.noise import LowBand, draw_low_band, lognormal_sigma, truncated_lognormal_sigma
from pipeline.diffusion.regions import region_sigma
from pipeline.models.config import SnapshotConfig
from pipeline.models.denoiser import (
    PATCH,
    CoreDenoiser,
    Denoiser,
    ShellDenoiser,
    pyramid_levels,
    set_dtype,
    set_recompute,
)
from pipeline.models.resample import rescale_bytes
from pipeline.models.shape import in_order, map_images
from pipeline.models.snapshot import Snapshot, Weights, write_snapshot
from pipeline.models.statistics import Statistics
from pipeline.training import checkpoint
from pipeline.training.averages import Averages
from pipeline.training.context import GrowthRound, TrainContext
from pipeline.training.denoising import (
    DenoisingSettings,
    DenoisingStep,
    DrawLow,
    DrawMaps,
    DrawSigma,
    ImagesAndText,
    held_out_error,
    in_turn,
)
from pipeline.training.distributed import rank_and_size
from pipeline.training.first_averages import EarlyWeights, first_averages, lend
from pipeline.training.fit import Hook
from pipeline.training.hooks import Every
from pipeline.training.schedule import moments_of
from pipeline.training.state import Learner, TrainState

SIGMA_MAX = 80.0  # of the core
FINISHED = 0.2  # fraction of patches that a shell sees without noise, in maps of regions
HELD_OUT = 64  # validation images of the held-out error
CONTRAST = 64  # samples by which the contrast of the finished model is set


@dataclass(frozen=True, kw_only=True)
class LevelSettings(DenoisingSettings):
    """Settings of `train_levels`.

    ema_std: relative widths of the weight averages. ema_snapshots: how often these are stored, to mix other widths
    from. early_images: when the weights are kept that later guide sampling; 0: never. augment: of the images, None:
    not at all. region_probability: fraction of images whose noise level differs by region. upscale_probability:
    fraction of images whose low band is degraded, so that the model learns to upscale."""

    ema_std: tuple[float, ...]
    ema_snapshots: int = 0
    early_images: int = 0
    augment: Augment | None = None
    region_probability: float = 0.0
    upscale_probability: float = 0.0
    degrade: Degrade = Degrade((), 0.0)


class NoiseLaw(NamedTuple):
    """How noise levels are drawn in training: `draw` gives those of whole images; `sigma_max` is the highest one in
    maps of regions."""

    draw: DrawSigma
    sigma_max: float


def core_noise(p_mean: float, p_std: float) -> NoiseLaw:
    """ln sigma ~ N(p_mean, p_std^2)."""
    return NoiseLaw(partial(_lognormal, p_mean, p_std), SIGMA_MAX)


def shell_noise(shell: ShellDenoiser, p_std: float, handover: float) -> NoiseLaw:
    """ln sigma ~ N(ln 0.9 s, p_std^2), where s is the RMS of the shell's high band; up to twice the noise level at
    which sampling hands over to the shell, `handover` times s."""
    sigma = shell.sigma_high_band
    top = 2 * handover * sigma
    return NoiseLaw(partial(_truncated, math.log(0.9 * sigma), p_std, top), top)


def _lognormal(p_mean: float, p_std: float, batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, p_mean, p_std, generator)


def _truncated(p_mean: float, p_std: float, top: float, batch: int, generator: torch.Generator) -> Tensor:
    return truncated_lognormal_sigma(batch, p_mean, p_std, top, generator)


def region_maps(denoiser: Denoiser, probability: float, sigma_max: float) -> DrawMaps | None:
    """Makes noise levels of whole images, of any shape, differ by region in a fraction of them; None where
    `probability` is 0."""
    if probability == 0:
        return None
    patch = PATCH * denoiser.resolution // pyramid_levels(denoiser)[0].resolution
    finished = FINISHED if isinstance(denoiser, ShellDenoiser) else 0.0

    def draw(sigma: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
        grid = [side // patch for side in size]
        return region_sigma(sigma, grid, probability, generator, sigma_max, finished=finished)

    return draw


def low_band_sampler(settings: LevelSettings, level: Denoiser, statistics: Statistics) -> DrawLow | None:
    """For shells that take the noise level of their low band as an input: gives the low band of a fraction of
    images a noise level of its own, and degrades it. None for other levels."""
    if isinstance(level, CoreDenoiser) or not level.net.bands:
        return None
    strengths, probability = settings.degrade, settings.upscale_probability

    def degrade_low(low: Tensor, generator: torch.Generator) -> Tensor:
        return statistics.standardise(degrade(statistics.to_uint8(low), strengths, generator))

    change = degrade_low if strengths.jpeg or strengths.blur > 0 else None

    def draw(images: Tensor, sigma: Tensor, generator: torch.Generator) -> LowBand:
        return draw_low_band(images, sigma, probability, generator, change)

    return draw


@dataclass(frozen=True)
class TrainedLevel:
    """One level of the pyramid to train, on its own loss.

    suffix: see DenoisingStep; "" for the finest level. fresh: new in this model, and so keeps early weights."""

    level: Denoiser
    noise: NoiseLaw
    lr: float
    suffix: str = ""
    fresh: bool = True
    make_step: Callable[..., DenoisingStep] = DenoisingStep

    def own(self) -> nn.Module:
        """The level without those below."""
        return nn.ModuleList(m for name, m in self.level.named_children() if name != "below")

    def step(self, run: TrainContext[LevelSettings], statistics: Statistics) -> DenoisingStep:
        """The update of this level."""
        s = run.settings
        return self.make_step(
            denoiser=self.level,
            batches=run.batches(self.level.resolution, s.augment),
            statistics=statistics,
            draw_sigma=self.noise.draw,
            settings=replace(s, lr=self.lr),
            draw_maps=region_maps(self.level, s.region_probability, self.noise.sigma_max),
            draw_low=low_band_sampler(s, self.level, statistics),
            suffix=self.suffix,
        )


def ema_decays(stds: Sequence[float]) -> dict[str, Callable[[int, int], float]]:
    """Decay functions of power-function averages, by name."""
    return {f"{std:g}": partial(power_decay, std) for std in stds}


@dataclass(frozen=True)
class HeldOut:
    """Held-out errors of the levels, on the same validation images and noise at all times.

    Each image has one noise level, also where training uses maps of regions, so that errors are comparable."""

    levels: Sequence[TrainedLevel]
    learners: Sequence[Learner]
    parts: Sequence[Sequence[ImagesAndText]]  # of each level, standardised; a part holds images of one size
    seed: int

    def error(self, i: int, weights: Tensor) -> float:
        """Error of level i with some weights of its learner."""
        self.levels[-1].level.eval()
        with self.learners[i].using(weights):
            return held_out_error(self.levels[i].level, self.parts[i], self.levels[i].noise.draw, self.seed)

    @contextmanager
    def lend(self, averages: Sequence[Tensor]) -> Iterator[dict[str, float]]:
        """Lend each level a weight average; yields the errors by name."""
        with lend(self.learners, averages):
            yield {
                f"held_out_error{level.suffix}": self.error(i, averages[i])
                for i, level in enumerate(self.levels)
            }

    @contextmanager
    def best_averages(
        self, averages: Sequence[Averages], tracked: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[dict[str, float]]:
        """Lend each level the weight average with the lowest error, coarse first, each around the chosen ones
        below; yields errors and chosen widths by name. `tracked`: of each level, those at the end of training."""
        metrics: dict[str, float] = {}
        with ExitStack() as chosen:
            for i, level in enumerate(self.levels):
                candidates = averages[i].candidates(tracked[i])
                errors = ((self.error(i, average), std, average) for std, average in candidates)
                error, std, best = min(
                    errors, key=lambda each: each[0] if math.isfinite(each[0]) else math.inf
                )
                metrics |= {f"held_out_error{level.suffix}": error, f"ema_std{level.suffix}": std}
                chosen.enter_context(self.learners[i].using(best))
            self.levels[-1].level.eval()
            yield metrics


def train_levels(
    run: TrainContext[LevelSettings],
    growth: GrowthRound,
    levels: Sequence[TrainedLevel],
    statistics: Statistics,
    build_config: Callable[[], SnapshotConfig],
    export: Callable[[SnapshotConfig, dict[str, float], Weights | None], None],
    parent: Snapshot | None = None,
) -> None:
    """Train some levels of a pyramid, coarse first and ending with the finest; then choose for each the weight
    average with the lowest held-out error.

    `build_config` gives the snapshot's config. `export(config, metrics, early weights)` is called on the first
    worker, while the model has the chosen weights. `parent` is the model that grows."""
    s, denoiser = run.settings, levels[-1].level
    set_dtype(denoiser, run.dtype)
    set_recompute(denoiser, run.recompute)
    learners = [
        Learner(level.own().requires_grad_(True), (0.9, 0.99), ema_decays(s.ema_std), run.shard_state)
        for level in levels
    ]
    pairs = list(zip(levels, learners, strict=True))
    early = EarlyWeights({lv.suffix: own for lv, own in pairs if lv.fresh}, s.early_images, s.batch_size)
    named = {f"net{level.suffix}": learner for level, learner in pairs}
    state = TrainState(named, extra=early.tensors(), slices=early.slices())
    checkpoint.resume(growth.folder / "checkpoints", state, run.numerics)
    steps = [level.step(run, statistics) for level in levels]
    parts = list(run.parts(run.pick("val", HELD_OUT)))
    standardised = [[(step.standardise(images), text) for images, text in parts] for step in steps]
    held_out = HeldOut(levels, learners, standardised, s.seed)
    progress = run.progress(state.nimg, growth)

    def log_samples(state: TrainState) -> None:
        shown = first_averages(learners)
        if rank_and_size()[0]:
            return
        with held_out.lend(shown) as errors:
            progress.write(state.nimg, errors)
            # Other guides may need weights that only the finished model has.
            snapshot = Snapshot(denoiser, build_config(), "")
            settings = replace(snapshot.config.sampling, guide="unconditional")
            run.log_samples(snapshot, growth.start + state.nimg, settings)

    def write_averaged(folder: Path, shown: Sequence[Tensor]) -> None:
        with lend(learners, shown):
            write_snapshot(folder, denoiser, build_config())

    moments = moments_of(s.num_images, s.batch_size, s.ema_snapshots)
    averages = [Averages(growth.folder / f"averages{lv.suffix}", own, moments) for lv, own in pairs]
    samples = Every(run.intervals.sample_images, s.batch_size, log_samples)
    watched = run.snapshots(learners, write_averaged, growth)
    hooks: list[Hook] = [progress, *averages, early, samples, watched]
    run.train(state, in_turn(steps[::-1]), hooks, growth)
    tracked, early_weights = [each.tracked() for each in averages], early.whole(state)
    if rank_and_size()[0]:
        return
    with held_out.best_averages(averages, tracked) as metrics:
        config = replace(build_config(), ema_std=metrics[f"ema_std{levels[-1].suffix}"])
        # Nothing is sampled from what earlier rounds make.
        if growth.total is None or growth.start + s.num_images == growth.total:
            metrics["contrast"] = sampled_contrast(run, Snapshot(denoiser, config, ""))
            config = replace(config, contrast=metrics["contrast"])
        export(config, metrics, early.state_dict(denoiser, early_weights, parent))


def sampled_contrast(run: TrainContext[LevelSettings], snapshot: Snapshot) -> float:
    """The factor of a model's samples, of training captions and without guidance, that gives them the contrast of
    real images (contrast.py)."""
    rows = np.array(run.pick("train", CONTRAST), np.int64)
    plain = replace(snapshot.config.sampling, guidance=1.0, guide="unconditional")
    samples: dict[int, Tensor] = {}
    for seeds, text, shape in run.dataset.requests(rows):
        made = generate(snapshot, text.to(run.device), seeds, plain, shape=shape)
        samples |= zip(seeds, made.images, strict=True)
    pooled = partial(rescale_bytes, resolution=snapshot.resolution)
    real = map_images(pooled, run.dataset.pictures(rows))
    return match_contrast(in_order(samples), real, snapshot.statistics)
