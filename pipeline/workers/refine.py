"""Worker of the refine stage: adversarial training of the fine-tuned model into one of few passes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.adversarial.discriminator import (
    LITE0_SIDE,
    CoreFeatures,
    FrozenFeatures,
    Heads,
    Lite0Features,
    PixelFeatures,
)
from pipeline.adversarial.few_step import generate_images, generate_refined
from pipeline.adversarial.guards import Guards, GuardSettings, guard_tensors
from pipeline.adversarial.octaves import match_octaves, own_batches
from pipeline.adversarial.random_features import RandomDistance
from pipeline.adversarial.step import AdversarialSettings, AdversarialStep, GuardState
from pipeline.config.params import Params
from pipeline.diffusion.contrast import match_contrast
from pipeline.diffusion.ema import halflife_decay
from pipeline.diffusion.generate import Generated, generate
from pipeline.errors import ConfigError
from pipeline.launch.worker import WorkerConfig
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import CoreDenoiser, Denoiser, pyramid_levels, set_dtype, set_recompute
from pipeline.models.finite import require_finite_metrics
from pipeline.models.resample import rescale, rescale_bytes
from pipeline.models.shape import SQUARE, Images, Shape, by_size, in_order, map_images
from pipeline.models.snapshot import Snapshot, load_snapshot, save_snapshot, write_snapshot
from pipeline.rng import key
from pipeline.training import checkpoint
from pipeline.training.context import GrowthRound, TrainContext
from pipeline.training.distributed import broadcast, merged, rank_and_size
from pipeline.training.hooks import Every
from pipeline.training.schedule import due
from pipeline.training.state import Learner, TrainState
from pipeline.workers.choices import Distances, flat, passes_to_keep, steps_to_upscale
from pipeline.workers.settings import check_parent, lineage_of, nets_of, train_context, unpack
from pipeline.workers.upscale_choice import measure_upscaling

PARENT = "models/finetuned"
CURVES = {"": ["generator_loss", "discriminator_loss", "anchor", "marginals"]}
REFERENCE = 64  # training images that scale the features of EfficientNet-Lite0
REAL = 1024  # training images, at most, from which the distance of samples is measured
GUARD_METRICS = {
    "lr_scale": "lr_scale",
    "rollbacks": "rollbacks",
    "score": "best_score",
    "best_nimg": "best_nimg",
}
CHOICE = 128  # samples in each number of passes, by which octaves are matched and passes are chosen

Context = TrainContext[AdversarialSettings]


def refine(config: WorkerConfig) -> None:
    """Refine models/finetuned into a model of few passes; exports the best state that the guards have seen, or
    models/finetuned as it is where refinement gained nothing.

    The core is refined on its own first, then the whole pyramid around it; a round that has finished is not trained
    again."""
    s = config.params.refine
    settings = unpack(AdversarialSettings, s, seed=config.params.seed)
    run = train_context("refine", config, s, settings, sample_in_fewest)
    parent = load_snapshot(config.root / PARENT, run.device)
    check_parent_fits(parent, run, config.params)
    levels = {level.resolution: level for level in pyramid_levels(parent.denoiser)}
    rounds = refining_rounds(config.params)
    metrics: dict[str, float] = {}
    start, total = 0, sum(rounds.values())
    for resolution, num_images in rounds.items():
        growth = GrowthRound(run.folder / f"to-{resolution}", start, total)
        start += num_images
        last = start == total
        if last or not growth.finished():
            refining = Refining(run.of_length(num_images), config, parent)
            refining.train_round(growth, levels[resolution], metrics if last else None)
        if not last:
            broadcast(torch.zeros(1, device=run.device))  # waits for the first worker to write the result
            refined = load_snapshot(growth.result / "model", run.device)
            levels[resolution].load_state_dict(refined.denoiser.state_dict())
            metrics |= json.loads((growth.result / "metrics.json").read_text())


def refining_rounds(params: Params) -> dict[int, int]:
    """Training images of each round, by the px of the level that it refines with all below it."""
    s = params.refine
    rounds = {params.core.resolution: s.core_images} if s.core_images else {}
    return rounds | {params.data.resolution: s.num_images}


class Round(NamedTuple):
    """What a round of refinement begins with."""

    step: AdversarialStep
    state: TrainState
    distance: RandomDistance  # of samples from training images
    guards: Guards


@dataclass(frozen=True)
class Refining:
    """The refinement of `parent`, whose networks become the student's."""

    run: Context
    config: WorkerConfig
    parent: Snapshot

    def train_round(self, growth: GrowthRound, level: Denoiser, earlier: Mapping[str, float] | None) -> None:
        """Train one level of the student with all below it. Commit the round's result; or, in the last round, the
        stage's result with the metrics of `earlier` rounds, which are None in all but the last."""
        run, s = self.run, self.config.params.refine
        step, state, distance, guards = self.begin(level)
        student, generator = step.student, state.learners["generator"]
        checkpoint.resume(growth.folder / "checkpoints", state, run.numerics)
        progress = run.progress(state.nimg, growth)
        if state.nimg == 0:
            progress.write(0, guards(state))

        def check(state: TrainState, _: dict[str, Tensor]) -> None:
            # The end counts too: there the learning rate has decayed.
            if due(state.nimg, s.check_images, s.batch_size) or state.nimg >= run.settings.num_images:
                progress.write(state.nimg, guards(state))

        def log_samples(state: TrainState) -> None:
            average = generator.whole(generator.emas["ema"])
            if rank_and_size()[0] == 0:
                with generator.using(average):
                    run.log_samples(self.snapshot(student), growth.start + state.nimg)

        def write_averaged(folder: Path, averages: Sequence[Tensor]) -> None:
            with generator.using(averages[0]):
                write_snapshot(folder, student, self.snapshot(student).config)

        samples = Every(s.sample_images, s.batch_size, log_samples)
        watched = run.snapshots([generator], write_averaged, growth)
        run.train(state, step, [progress, check, samples, watched], growth)
        guard, best = GuardState.load(state), generator.whole(state.extra["best"])
        with generator.using(best):
            refined = self.snapshot(student)
            if earlier is None:
                commit_round(run, growth, refined, guard_metrics(guard, f"_{level.resolution}"))
            else:
                metrics = {**earlier, **guard_metrics(guard)}
                export_best(run, refined, self.config.root / PARENT, metrics, distance)

    def begin(self, level: Denoiser) -> Round:
        """A round that trains `level` with all below it, from its beginning."""
        run, s = self.run, self.config.params.refine
        student = level.requires_grad_(True)  # without dropout, as what is exported
        set_dtype(student, run.dtype)
        set_recompute(student, run.recompute)
        torch.manual_seed(key(run.settings.seed, f"{run.stage}-weights", level.resolution))
        step = build_step(self.config, run, self.parent, student)
        decays = {"ema": partial(halflife_decay, float(s.ema_halflife_images))}
        generator = Learner(student, (0.0, 0.99), decays, run.shard_state)
        discriminator = Learner(step.heads, (0.0, 0.99), sharded=run.shard_state)
        learners = {"generator": generator, "discriminator": discriminator}
        state = TrainState(learners, extra=guard_tensors(generator), slices={"best": generator.slices})
        real = run.dataset.pictures(np.array(run.pick("train", REAL)))
        pooled = map_images(partial(rescale_bytes, resolution=level.resolution), real)
        distance = RandomDistance(pooled, level.resolution)
        return Round(step, state, distance, self.guards(step, distance))

    def guards(self, step: AdversarialStep, distance: RandomDistance) -> Guards:
        """They measure samples by `distance`, or by the features of the heads (refine.select_by)."""
        run, s, statistics = self.run, self.config.params.refine, self.parent.statistics
        images, text = run.pictures_and_text(run.pick("train", s.check_samples))
        to_uint8 = partial(map_images, lambda samples: statistics.to_uint8(samples).cpu())
        by_kid = (lambda samples: distance(to_uint8(samples))) if s.select_by == "kid" else None
        resolution = step.student.resolution
        standardised = map_images(lambda real: rescale(statistics.standardise(real), resolution), images)
        return Guards(step, standardised, text, unpack(GuardSettings, s), by_kid)

    def snapshot(self, student: Denoiser) -> Snapshot:
        """The student as it is, or a level of it."""
        return Snapshot(student, build_config(self.run, student, self.parent), "")


def guard_metrics(guard: GuardState, suffix: str = "") -> dict[str, float]:
    """What the guards remember, for metrics.json."""
    return {f"{name}{suffix}": getattr(guard, own) for name, own in GUARD_METRICS.items()}


def commit_round(run: Context, growth: GrowthRound, refined: Snapshot, metrics: Mapping[str, float]) -> None:
    """Commit the result of a round, from which the next one starts. Only rank 0 writes."""
    if rank_and_size()[0]:
        return
    require_finite_metrics(metrics, f"{run.stage}: metrics.json", "lower the learning rate")
    with artifacts.commit_directory(growth.result, {"stage": run.stage}) as folder:
        save_snapshot(folder / "model", refined.denoiser, refined.config)
        (folder / "metrics.json").write_text(json.dumps(metrics))


def export_best(
    run: Context,
    refined: Snapshot,
    parent: Path,
    earlier: Mapping[str, float],
    distance: RandomDistance,
) -> None:
    """Match contrast and octaves of the refined model (which changes it), choose its passes, and export it; or its
    parent, unchanged, where nothing was gained. The metrics are those of training and of this choice. Workers share
    the sampling: all call it together."""
    unrefined = load_snapshot(parent, run.device)
    set_dtype(unrefined.denoiser, run.dtype)
    rows = run.pick("train", CHOICE)
    images, text = run.pictures_and_text(rows)
    seeds = [key(run.settings.seed, "choice", row) for row in rows]
    shapes = [(places, Shape.of(alike, refined.resolution)) for places, alike in by_size(images)]
    drawn = [sampled(generate_refined, refined, text, seeds, shapes, passes=n) for n in refined.config.passes]
    contrast = match_contrast([image for each in drawn for image in each], images, refined.statistics)
    refined = refined._replace(config=replace(refined.config, contrast=contrast))
    factors = match_octaves(refined, map_images(refined.statistics.standardise, images), text, seeds)
    distances = compare_passes(refined, unrefined, text, seeds, shapes, distance)
    metrics = {
        **earlier,
        "contrast": contrast,
        **{f"octave_factor_{size}": factor for size, factor in factors.items()},
        **flat(distances),
    }
    kept = passes_to_keep(distances)
    if kept:
        upscaled = measure_upscaling(run, refined, unrefined, distance)
        chosen = replace(refined.config, passes=kept, upscale_steps=steps_to_upscale(upscaled))
        run.export(refined.denoiser, chosen, metrics | upscaled, CURVES)
    else:
        early = None if unrefined.early is None else unrefined.early.state_dict()
        run.export(unrefined.denoiser, unrefined.config, metrics, CURVES, early)


def sample_in_fewest(
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    settings: SamplerSettings | None = None,
    shape: Shape = SQUARE,
) -> Generated:
    """Images for sample grids: a refined model has its settings built in, and makes them in its fewest passes."""
    return generate_images(snapshot, text, seeds, shape=shape)


def check_parent_fits(parent: Snapshot, run: Context, params: Params) -> None:
    """Raise ConfigError where the model to refine does not fit the parameters or the data."""
    if parent.resolution != params.data.resolution:
        problem = f"{PARENT} makes {parent.resolution} px, data.resolution is {params.data.resolution}"
        raise ConfigError("E-CFG-020", "params.yaml: refine", problem, "run `dvc repro finetune`")
    check_parent(parent, run)


def check_sides(run: Context, resolution: int) -> None:
    """Raise ConfigError where images are too small for Lite0Features at the resolution of a level."""
    full = run.dataset.resolution
    sizes = [Shape(b.height / full, b.width / full).at(resolution) for b in run.dataset.buckets]
    small = [size for size in sizes if min(size) < LITE0_SIDE]
    if small:
        height, width = small[0]
        problem = f"lite0 takes images of {LITE0_SIDE} px a side or more; some have {width}x{height}"
        if resolution < full:
            problem += f" at the core's resolution of {resolution} px"
        where, fix = "params.yaml: refine.discriminators", "leave it out, or raise data.resolution"
        raise ConfigError("E-CFG-087", where, problem, fix)


def build_step(config: WorkerConfig, run: Context, parent: Snapshot, student: Denoiser) -> AdversarialStep:
    """The update of `student`, `parent` or a level of it, with fresh heads on frozen features."""
    s = config.params.refine
    names = s.discriminators
    frozen: list[FrozenFeatures] = []
    # A copy, as the parent's weights become the student's. Loaded even if unused: this advances torch's own
    # generator, from which the heads draw their weights.
    core = pyramid_levels(load_snapshot(config.root / PARENT, run.device).denoiser)[0]
    if "self" in names:
        assert isinstance(core, CoreDenoiser)
        frozen.append(CoreFeatures(core))
    if "lite0" in names:
        check_sides(run, student.resolution)
        reference, _ = max(run.parts(run.pick("train", REFERENCE)), key=lambda part: len(part[0]))
        real = rescale(parent.statistics.standardise(reference), student.resolution)
        frozen.append(Lite0Features(parent.statistics, real))
    if "pixels" in names:
        frozen.append(PixelFeatures(fold=student.resolution // core.resolution))
    heads = Heads([c for network in frozen for c in network.channels], run.text_dim, s.head_channels)
    return AdversarialStep(
        student=student,
        heads=heads.to(run.device),
        frozen=frozen,
        batches=run.batches(student.resolution),
        statistics=parent.statistics,
        settings=run.settings,
    )


def compare_passes(
    refined: Snapshot,
    unrefined: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    shapes: Sequence[tuple[list[int], Shape]],
    distance: Callable[[Images], float],
) -> dict[int, Distances]:
    """Distances by number of passes, of samples of these captions and seeds; `shapes` has the places of each shape.

    Each shell makes one step. The unrefined model has no guidance, which would double its cost; its shells repeat
    the levels below, so that it costs a little more all the same."""
    plain = replace(unrefined.config.sampling, guidance=1.0, early_exit=False)
    shells = [1] * len(refined.config.shells)
    own = (text, seeds, shapes)
    return {
        n: Distances(
            distance(sampled(generate_refined, refined, *own, passes=n)),
            distance(sampled(generate, unrefined, *own, settings=plain, steps=[n, *shells])),
        )
        for n in refined.config.passes
    }


def sampled(
    make: Callable[..., Generated],
    snapshot: Snapshot,
    text: Conditioning,
    seeds: Sequence[int],
    shapes: Sequence[tuple[list[int], Shape]],
    **settings: Any,
) -> Images:
    """Samples of these captions and seeds, uint8; `shapes` has the places of each shape."""
    own: dict[int, Tensor] = {}
    for places, shape in own_batches(shapes):
        own_text, own_seeds = text.select(torch.tensor(places)), [seeds[place] for place in places]
        made = make(snapshot, own_text, own_seeds, shape=shape, **settings)
        own |= zip(places, made.images, strict=True)
    return in_order(merged(own))


def build_config(run: Context, student: Denoiser, parent: Snapshot) -> SnapshotConfig:
    """config.json of the refined model or of a level of it: the networks and sampling settings are its parent's."""
    nets = nets_of(parent)[: len(pyramid_levels(student))]
    config = run.snapshot_config(
        "refined", student, nets, parent.statistics, parent.config.sampling, lineage_of(parent)
    )
    return replace(config, passes=run.settings.passes, sigma_start=run.settings.sigma_start)
