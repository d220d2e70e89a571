"""Worker of the refine stage: adversarial refinement into a model of few passes."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.adversarial.discriminator import CoreFeatures, FrozenFeatures, Heads, Lite0Features
from pipeline.adversarial.few_step import generate_refined
from pipeline.adversarial.guards import Guards, guard_state
from pipeline.adversarial.step import AdversarialStep
from pipeline.diffusion.ema import halflife_decay
from pipeline.errors import ConfigError
from pipeline.models.config import SnapshotConfig
from pipeline.models.denoiser import ShellDenoiser, pyramid_levels, set_dtype, set_recompute
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.training import checkpoint
from pipeline.training.context import TrainContext, check_parent
from pipeline.training.distributed import rank_and_size
from pipeline.training.hooks import Every, due
from pipeline.training.state import Learner, TrainState


def refine(config: dict[str, Any]) -> None:
    """Adversarial refinement into a model of few passes; keeps the best state that the guards saw."""
    run = TrainContext(
        "refine", config, lambda snapshot, text, seeds, *_: generate_refined(snapshot, text, seeds)
    )
    p, s = run.params, run.params.refine
    parent = load_snapshot(run.root / "models/finetuned", run.device)
    if parent.resolution != p.data.resolution:
        problem = f"models/finetuned makes {parent.resolution} px, data.resolution is {p.data.resolution}"
        raise ConfigError("E-CFG-020", "params.yaml: refine", problem, "run `dvc repro finetune`")
    check_parent(parent, run)
    teacher = load_snapshot(run.root / "models/finetuned", run.device)
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    student = parent.denoiser.requires_grad_(True).train()
    set_dtype(student, run.dtype)
    set_recompute(student, run.recompute)
    frozen: list[FrozenFeatures] = []
    if "self" in s.discriminators:
        core = pyramid_levels(teacher.denoiser)[0]
        assert not isinstance(core, ShellDenoiser)
        frozen.append(CoreFeatures(core))
    if "lite0" in s.discriminators:
        reference, _, _ = run.images_and_names(run.pick("train", 64))
        frozen.append(Lite0Features(parent.statistics, parent.statistics.standardise(reference)))
    heads = Heads([c for network in frozen for c in network.channels], text_dim).to(run.device)
    generator = Learner(student, (0.0, 0.99), {"ema": partial(halflife_decay, float(s.ema_halflife_images))})
    state = TrainState({"generator": generator, "discriminator": Learner(heads, (0.0, 0.99))})
    state.extra = guard_state(generator)
    checkpoint.resume(run.folder / "checkpoints", state)
    step = AdversarialStep(
        student=student,
        heads=heads,
        frozen=frozen,
        batches=run.batches(p.data.resolution),
        statistics=parent.statistics,
        seed=p.seed,
        batch_size=s.batch_size,
        shards=s.shards,
        num_images=s.num_images,
        lr=s.lr,
        discriminator_lr=s.discriminator_lr,
        warmup_images=s.warmup_images,
        anchor=s.anchor,
        penalty_weight=s.penalty_weight,
        penalty_std=s.penalty_std,
        penalty_interval=s.penalty_interval,
        sigma_start=s.sigma_start,
        passes=s.passes,
        pass_probs=s.pass_probs,
    )
    images, text, _ = run.images_and_names(run.pick("train", s.check_samples))
    guards = Guards(step, parent.statistics.standardise(images), text, s.min_spread, s.max_caption_error)
    progress = run.progress(state.nimg)
    if state.nimg == 0:
        progress.write(0, guards(state))

    def check(state: TrainState, _: dict[str, Tensor]) -> None:
        if due(state.nimg, s.check_images, s.batch_size):
            progress.write(state.nimg, guards(state))

    def finish() -> SnapshotConfig:
        config = run.snapshot_config("refined", student, parent.statistics, parent)
        return replace(config, passes=s.passes, sigma_start=s.sigma_start)

    def look(state: TrainState) -> None:
        if rank_and_size()[0] == 0:
            with generator.using(generator.emas["ema"]):
                snapshot = Snapshot(student, finish(), "")
                run.sample_grid(snapshot, run.folder / "samples" / f"nimg-{state.nimg:012d}.png")

    run.train(state, step, [progress, check, Every(s.sample_images, s.batch_size, look)])
    names = ("lr_scale", "rollbacks", "score", "best_nimg")
    metrics = dict(zip(names, state.extra["guard"][:4].tolist(), strict=True))
    with generator.using(state.extra["best"]):
        run.export(student, finish(), metrics, {"": ["generator_loss", "discriminator_loss", "anchor"]})
