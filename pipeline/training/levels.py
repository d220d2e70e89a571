"""One process of a training stage: build, resume, fit, export.

A worker gets a plain dict (`params`, `root`, `run_dir`, `precision`, `recompute`, `cuda_graphs`, `compile`,
`threads`), so that it can be sent to another machine. All state lives in `run_dir`; the finished model and its
reports in `run_dir/result`. Rank and world size come from torch.distributed where it is initialised.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.config.params import Params
from pipeline.data.degrade import Degrade, degrade
from pipeline.diffusion.ema import power_decay
from pipeline.diffusion.noise import LowBand, draw_low_band, lognormal_sigma, truncated_lognormal_sigma
from pipeline.diffusion.pyramid import handover_of
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
from pipeline.models.snapshot import Snapshot, Weights
from pipeline.models.statistics import Statistics
from pipeline.training import checkpoint
from pipeline.training.averages import Averages, moments_of
from pipeline.training.context import GrowthRound, TrainContext
from pipeline.training.denoising import DenoisingStep, DrawLow, DrawSigma, held_out_error, in_turn
from pipeline.training.distributed import rank_and_size
from pipeline.training.fit import Hook
from pipeline.training.hooks import Every
from pipeline.training.state import Learner, TrainState

SIGMA_MAX = 80.0  # of the core
FINISHED = 0.2  # share of patches that a shell sees without noise, in maps of regions


def ema_decays(stds: Sequence[float]) -> dict[str, Callable[[int, int], float]]:
    """Decay functions of power-function averages, by name."""
    return {f"{std:g}": partial(power_decay, std) for std in stds}


@dataclass(frozen=True)
class TrainedLevel:
    """One level of the pyramid in training, on its own loss, with its own learner.

    draw_sigma: noise levels of whole images; sigma_max: the highest one in maps of regions. suffix: of what has the
    level's name (see DenoisingStep), "" at the finished resolution. fresh: grown here, and has early weights."""

    level: Denoiser
    draw_sigma: DrawSigma
    sigma_max: float
    lr: float
    suffix: str = ""
    fresh: bool = True
    make_step: Callable[..., DenoisingStep] = DenoisingStep

    def own(self) -> nn.Module:
        """All of the level but those below."""
        return nn.ModuleList(m for name, m in self.level.named_children() if name != "below")


def train_levels(
    run: TrainContext,
    phase: GrowthRound,
    parts: Sequence[TrainedLevel],
    statistics: Statistics,
    finish: Callable[[], SnapshotConfig],
    export: Callable[[SnapshotConfig, dict[str, float], Weights | None], None],
    parent: Snapshot | None = None,
) -> None:
    """Train some levels of a pyramid, coarse first and with the finest among them, each on its own denoising loss;
    choose for each the weight average with the least held-out error.

    `finish` gives the snapshot's config; `export` gets it, the numbers and the early weights, while the model has
    the chosen weights, on the first worker. Levels of noise come from `draw_sigma`; with regions they are spread
    over patches. The held-out error is that of whole images at one level at all times, so that it compares."""
    s, p = run.section, run.params
    denoiser = parts[-1].level
    set_dtype(denoiser, run.dtype)
    set_recompute(denoiser, run.recompute)
    owned = [part.own().requires_grad_(True) for part in parts]
    learners = [Learner(own, (0.9, 0.99), ema_decays(s.ema_std)) for own in owned]
    state = TrainState({f"net{part.suffix}": learner for part, learner in zip(parts, learners, strict=True)})
    first = next(iter(learners[0].emas))
    kept = {
        f"early{part.suffix}": learner
        for part, learner in zip(parts, learners, strict=True)
        if s.early_images and part.fresh
    }
    state.extra = {name: learner.emas[first].clone() for name, learner in kept.items()}
    checkpoint.resume(phase.folder / "checkpoints", state)
    steps = [
        part.make_step(
            denoiser=part.level,
            batches=run.batches(part.level.resolution, run.augment),
            statistics=statistics,
            draw_sigma=with_region_maps(part.level, p.regions.probability, part.draw_sigma, part.sigma_max),
            seed=p.seed,
            batch_size=s.batch_size,
            shards=s.shards,
            lr=part.lr,
            warmup_images=s.warmup_images,
            num_images=s.num_images,
            text_dropout=s.text_dropout,
            draw_low=low_band_sampler(run, part.level, statistics),
            bridge=p.regions.maps == "bridge",
            recorded=run.recorded,
            compiled=run.compiled,
            suffix=part.suffix,
        )
        for part in parts
    ]
    images, names, _ = run.images_and_names(run.pick("val", 64))
    held_out = [step.standardise(images) for step in steps]

    def error_of(i: int, average: Tensor) -> float:
        denoiser.eval()
        with learners[i].using(average):
            return held_out_error(parts[i].level, held_out[i], names, parts[i].draw_sigma, p.seed)

    progress = run.progress(state.nimg, phase)

    def keep_early(state: TrainState, _: dict[str, Tensor]) -> None:
        if state.nimg - s.batch_size < s.early_images <= state.nimg:
            for name, learner in kept.items():
                state.extra[name].copy_(learner.emas[first])

    def look(state: TrainState) -> None:
        if rank_and_size()[0]:
            return
        with ExitStack() as averaged:
            for learner in learners:
                averaged.enter_context(learner.using(learner.emas[first]))
            errors = {
                f"held_out_error{part.suffix}": error_of(i, learners[i].emas[first])
                for i, part in enumerate(parts)
            }
            progress.write(state.nimg, errors)
            path = run.folder / "samples" / f"nimg-{phase.start + state.nimg:012d}.png"
            # Guided without captions; the others come with the finished model.
            snapshot = Snapshot(denoiser, finish(), "")
            run.sample_grid(snapshot, path, replace(snapshot.config.sampling, guide="unconditional"))

    moments = moments_of(s.num_images, s.batch_size, s.ema_snapshots)
    averages = [
        Averages(phase.folder / f"averages{part.suffix}", learner, moments)
        for part, learner in zip(parts, learners, strict=True)
    ]
    hooks: list[Hook] = [progress, *averages, keep_early, Every(s.sample_images, s.batch_size, look)]
    run.train(state, in_turn(steps[::-1]), hooks, phase)
    if rank_and_size()[0]:
        return
    numbers: dict[str, float] = {}
    with ExitStack() as chosen:
        for i, part in enumerate(parts):  # each around the chosen ones below
            measured = ((error_of(i, average), std, average) for std, average in averages[i].candidates())
            error, std, best = min(measured, key=lambda candidate: candidate[0])
            numbers |= {f"held_out_error{part.suffix}": error, f"ema_std{part.suffix}": std}
            chosen.enter_context(learners[i].using(best))
        denoiser.eval()
        early = early_weights(denoiser, kept, state.extra, parent) if s.early_images else None
        export(replace(finish(), ema_std=std), numbers, early)


def early_weights(
    denoiser: Denoiser, learners: Mapping[str, Learner], kept: Mapping[str, Tensor], parent: Snapshot | None
) -> Weights:
    """The state of `denoiser` with the early weights, kept by name, of what `learners` trained, and those of its
    parent below."""
    with ExitStack() as early:
        for name, learner in learners.items():
            early.enter_context(learner.using(kept[name]))
        weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    if parent is not None and parent.early is not None:
        below = "below." * (len(pyramid_levels(denoiser)) - len(pyramid_levels(parent.early)))
        weights |= {f"{below}{name}": tensor for name, tensor in parent.early.state_dict().items()}
    return weights


def with_region_maps(
    denoiser: Denoiser,
    probability: float,
    draw_sigma: Callable[[int, torch.Generator], Tensor],
    sigma_max: float,
) -> Callable[[int, torch.Generator], Tensor]:
    """`draw_sigma`, spread over patches with `probability` (0: as it is)."""
    if probability == 0:
        return draw_sigma
    grid = pyramid_levels(denoiser)[0].resolution // PATCH
    finished = FINISHED if isinstance(denoiser, ShellDenoiser) else 0.0

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        sigma = draw_sigma(batch, generator)
        return region_sigma(sigma, grid, probability, generator, sigma_max, finished=finished)

    return draw


def low_band_sampler(run: TrainContext, level: Denoiser, statistics: Statistics) -> DrawLow | None:
    """How the low band of a shell that can be told of it gets a clock of its own and is degraded, in a share of
    the images; None for other levels."""
    if isinstance(level, CoreDenoiser) or not level.net.bands:
        return None
    s = run.params.finetune
    strengths = Degrade(s.degrade.jpeg, s.degrade.blur)

    def worse(low: Tensor, generator: torch.Generator) -> Tensor:
        return statistics.standardise(degrade(statistics.to_uint8(low), strengths, generator))

    change = worse if strengths.jpeg or strengths.blur > 0 else None

    def draw(images: Tensor, sigma: Tensor, generator: torch.Generator) -> LowBand:
        return draw_low_band(images, sigma, s.upscale_probability, generator, change)

    return draw


def noise_law(p: Params, level: Denoiser) -> tuple[DrawSigma, float]:
    """How the noise levels of one level of the pyramid are drawn, and how high they go."""
    if isinstance(level, CoreDenoiser):
        return partial(_lognormal, p.pretrain.p_mean, p.pretrain.p_std), SIGMA_MAX
    sigma = level.sigma_high_band
    top = 2 * handover_of(p.sampling.handover, len(pyramid_levels(level)) - 2) * sigma
    return partial(_truncated, math.log(0.9 * sigma), p.finetune.p_std, top), top


def _lognormal(p_mean: float, p_std: float, batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, p_mean, p_std, generator)


def _truncated(p_mean: float, p_std: float, top: float, batch: int, generator: torch.Generator) -> Tensor:
    return truncated_lognormal_sigma(batch, p_mean, p_std, top, generator)
