"""Worker of the refine stage: adversarial training of the fine-tuned model into one of few passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
from pipeline.adversarial.octaves import match_octaves
from pipeline.adversarial.random_features import RandomDistance
from pipeline.adversarial.step import AdversarialSettings, AdversarialStep, GuardState
from pipeline.config.params import Params
from pipeline.diffusion.ema import halflife_decay
from pipeline.diffusion.generate import Generated, generate
from pipeline.errors import ConfigError
from pipeline.launch.worker import WorkerConfig
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import CoreDenoiser, Denoiser, pyramid_levels, set_dtype, set_recompute
from pipeline.models.shape import SQUARE, Images, Shape, by_size, in_order, map_images
from pipeline.models.snapshot import Snapshot, load_snapshot, write_snapshot
from pipeline.rng import key
from pipeline.training import checkpoint
from pipeline.training.context import TrainContext
from pipeline.training.distributed import rank_and_size
from pipeline.training.hooks import Every
from pipeline.training.schedule import due
from pipeline.training.state import Learner, TrainState
from pipeline.workers.settings import check_parent, lineage_of, nets_of, train_context, unpack
from pipeline.workers.upscale_choice import measure_upscaling, steps_to_upscale

PARENT = "models/finetuned"
CURVES = {"": ["generator_loss", "discriminator_loss", "anchor", "marginals"]}
REFERENCE = 64  # training images that scale the features of EfficientNet-Lite0
REAL = 1024  # training images, at most, from which the distance of samples is measured
CHOICE = 128  # samples in each number of passes, by which octaves are matched and passes are chosen

Context = TrainContext[AdversarialSettings]


def refine(config: WorkerConfig) -> None:
    """Refine models/finetuned into a model of few passes; exports the best state that the guards have seen, or
    models/finetuned as it is where refinement gained nothing."""
    s = config.params.refine
    settings = unpack(AdversarialSettings, s, seed=config.params.seed)
    run = train_context("refine", config, s, settings, sample_in_fewest)
    parent = load_snapshot(config.root / PARENT, run.device)
    check_parent_fits(parent, run, config.params)
    student = parent.denoiser.requires_grad_(True)  # without dropout, as what is exported
    set_dtype(student, run.dtype)
    set_recompute(student, run.recompute)
    step = build_step(config, run, parent)
    decays = {"ema": partial(halflife_decay, float(s.ema_halflife_images))}
    generator = Learner(student, (0.0, 0.99), decays, run.shard_state)
    discriminator = Learner(step.heads, (0.0, 0.99), sharded=run.shard_state)
    learners = {"generator": generator, "discriminator": discriminator}
    state = TrainState(learners, extra=guard_tensors(generator), slices={"best": generator.slices})
    checkpoint.resume(run.folder / "checkpoints", state, run.numerics)
    images, text = run.pictures_and_text(run.pick("train", s.check_samples))
    real = run.dataset.pictures(np.array(run.pick("train", REAL)))
    distance, statistics = RandomDistance(real, parent.resolution), parent.statistics
    to_uint8 = partial(map_images, lambda samples: statistics.to_uint8(samples).cpu())
    by_kid = (lambda samples: distance(to_uint8(samples))) if s.select_by == "kid" else None
    standardised = map_images(statistics.standardise, images)
    guards = Guards(step, standardised, text, unpack(GuardSettings, s), by_kid)
    progress = run.progress(state.nimg)
    if state.nimg == 0:
        progress.write(0, guards(state))

    def check(state: TrainState, _: dict[str, Tensor]) -> None:
        # The end counts too: there the learning rate has decayed.
        if due(state.nimg, s.check_images, s.batch_size) or state.nimg >= s.num_images:
            progress.write(state.nimg, guards(state))

    def log_samples(state: TrainState) -> None:
        average = generator.whole(generator.emas["ema"])
        if rank_and_size()[0] == 0:
            with generator.using(average):
                snapshot = Snapshot(student, build_config(run, student, parent), "")
                run.log_samples(snapshot, state.nimg)

    def write_averaged(folder: Path, averages: Sequence[Tensor]) -> None:
        with generator.using(averages[0]):
            write_snapshot(folder, student, build_config(run, student, parent))

    samples = Every(s.sample_images, s.batch_size, log_samples)
    run.train(state, step, [progress, check, samples, run.snapshots([generator], write_averaged)])
    best = generator.whole(state.extra["best"])
    if rank_and_size()[0] == 0:
        with generator.using(best):
            refined = Snapshot(student, build_config(run, student, parent), "")
            export_best(run, refined, config.root / PARENT, GuardState.load(state), distance)


def export_best(
    run: Context,
    refined: Snapshot,
    parent: Path,
    guard: GuardState,
    distance: RandomDistance,
) -> None:
    """Match the octaves of the refined model (which changes it), choose its passes, and export it; or its parent,
    unchanged, where nothing was gained."""
    unrefined = load_snapshot(parent, run.device)
    set_dtype(unrefined.denoiser, run.dtype)
    rows = run.pick("train", CHOICE)
    images, text = run.pictures_and_text(rows)
    seeds = [key(run.settings.seed, "choice", row) for row in rows]
    standardised = map_images(refined.statistics.standardise, images)
    factors = match_octaves(refined, standardised, text, seeds)
    shapes = [(places, Shape.of(alike, refined.resolution)) for places, alike in by_size(images)]
    distances = compare_passes(refined, unrefined, text, seeds, shapes, distance)
    metrics = {
        "lr_scale": guard.lr_scale,
        "rollbacks": guard.rollbacks,
        "score": guard.best_score,
        "best_nimg": guard.best_nimg,
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


def check_sides(run: Context) -> None:
    """Raise ConfigError where images are too small for Lite0Features."""
    small = [bucket for bucket in run.dataset.buckets if min(bucket.height, bucket.width) < LITE0_SIDE]
    if small:
        size = f"{small[0].width}x{small[0].height}"
        problem = f"lite0 takes images of {LITE0_SIDE} px a side or more; some have {size}"
        where = "params.yaml: refine.discriminators"
        raise ConfigError("E-CFG-087", where, problem, "leave it out, or raise data.resolution")


def build_step(config: WorkerConfig, run: Context, parent: Snapshot) -> AdversarialStep:
    """The update, with fresh heads on frozen features."""
    names = config.params.refine.discriminators
    frozen: list[FrozenFeatures] = []
    # A copy, as the parent's weights become the student's. Loaded even if unused: this advances torch's own
    # generator, from which the heads draw their weights.
    core = pyramid_levels(load_snapshot(config.root / PARENT, run.device).denoiser)[0]
    if "self" in names:
        assert isinstance(core, CoreDenoiser)
        frozen.append(CoreFeatures(core))
    if "lite0" in names:
        check_sides(run)
        reference, _ = max(run.parts(run.pick("train", REFERENCE)), key=lambda part: len(part[0]))
        frozen.append(Lite0Features(parent.statistics, parent.statistics.standardise(reference)))
    if "pixels" in names:
        frozen.append(PixelFeatures(fold=parent.resolution // core.resolution))
    heads = Heads([c for network in frozen for c in network.channels], run.text_dim).to(run.device)
    return AdversarialStep(
        student=parent.denoiser,
        heads=heads,
        frozen=frozen,
        batches=run.batches(parent.resolution),
        statistics=parent.statistics,
        settings=run.settings,
    )


class Distances(NamedTuple):
    """Kernel distance to training images in some number of passes, and of the model before refinement in as many
    steps of every level."""

    refined: float
    unrefined: float


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

    def sampled(make: Callable[..., Generated], snapshot: Snapshot, **settings: Any) -> Images:
        samples: dict[int, Tensor] = {}
        for places, shape in shapes:
            own_text, own_seeds = text.select(torch.tensor(places)), [seeds[place] for place in places]
            made = make(snapshot, own_text, own_seeds, shape=shape, **settings)
            samples |= zip(places, made.images, strict=True)
        return in_order(samples)

    return {
        n: Distances(
            distance(sampled(generate_refined, refined, passes=n)),
            distance(sampled(generate, unrefined, settings=plain, steps=[n, *shells])),
        )
        for n in refined.config.passes
    }


def passes_to_keep(distances: Mapping[int, Distances]) -> tuple[int, ...]:
    """The numbers of passes in which refinement gained something."""
    return tuple(n for n, each in distances.items() if each.refined < each.unrefined)


def describe_choice(distances: Mapping[int, Distances]) -> list[str]:
    """What was chosen, a line for each number of passes."""
    kept = passes_to_keep(distances)
    lines = []
    for n, (refined, unrefined) in distances.items():
        passes, what = "1 pass" if n == 1 else f"{n} passes", "kept" if n in kept else "dropped"
        lines.append(f"{passes}: distance {refined:.3g}, before refinement {unrefined:.3g}; {what}")
    if not kept:
        lines.append("nothing was gained: models/refined is the fine-tuned model, unchanged")
    return lines


def flat(distances: Mapping[int, Distances]) -> dict[str, float]:
    """Distances as metrics."""
    return {
        f"{name}_distance_{n}": value
        for n, each in distances.items()
        for name, value in each._asdict().items()
    }


def unflat(metrics: Mapping[str, float]) -> dict[int, Distances]:
    """The inverse of `flat`, which leaves other metrics out."""
    passes = sorted(int(name.rpartition("_")[2]) for name in metrics if name.startswith("refined_distance_"))
    return {n: Distances(*(metrics[f"{name}_distance_{n}"] for name in Distances._fields)) for n in passes}


def build_config(run: Context, student: Denoiser, parent: Snapshot) -> SnapshotConfig:
    """config.json of the refined model, which has the networks and sampling settings of its parent."""
    config = run.snapshot_config(
        "refined", student, nets_of(parent), parent.statistics, parent.config.sampling, lineage_of(parent)
    )
    return replace(config, passes=run.settings.passes, sigma_start=run.settings.sigma_start)
