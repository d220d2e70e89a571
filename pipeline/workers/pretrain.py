"""Worker of the pretrain stage: the low-resolution core."""

from collections.abc import Callable
from typing import Any

from pipeline.data.statistics import measure_statistics
from pipeline.models.config import SnapshotConfig
from pipeline.models.denoiser import build_core, pyramid_levels
from pipeline.models.snapshot import Snapshot, Weights, at_resolution, load_snapshot
from pipeline.training.context import GrowthRound, TrainContext, check_parent
from pipeline.training.denoising import DenoisingStep
from pipeline.training.levels import TrainedLevel, noise_law, train_levels


def pretrain(config: dict[str, Any]) -> None:
    """Train the low-resolution core from scratch; or take it out of the model in the folder `config["init"]`, which
    `finetune` is going to grow (what finetune.init_from pins)."""
    run = TrainContext("pretrain", config)
    if "init" in config:
        extract_core(run, load_snapshot(config["init"], run.device))
    else:
        train_core(run)


def extract_core(run: TrainContext, origin: Snapshot) -> None:
    """Export the core inside of a model."""
    check_parent(origin, run)
    core = at_resolution(origin, pyramid_levels(origin.denoiser)[0].resolution)
    config = run.snapshot_config("core", core.denoiser, origin.statistics, core)
    early = None if core.early is None else core.early.state_dict()
    run.export(core.denoiser, config, {"num_images": 0}, {"": ["loss", "error"]}, early)


def train_core(run: TrainContext, make_step: Callable[..., DenoisingStep] = DenoisingStep) -> None:
    """`pretrain`, with another update if one is given."""
    p = run.params
    statistics = measure_statistics(run.dataset, p.core.resolution)
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    denoiser = build_core(p.core.resolution, text_dim, run.core_net()).to(run.device)

    def finish() -> SnapshotConfig:
        return run.snapshot_config("core", denoiser, statistics, None)

    def export(config: SnapshotConfig, numbers: dict[str, float], early: Weights | None) -> None:
        run.export(denoiser, config, numbers, {"": ["loss", "error"]}, early)

    part = TrainedLevel(denoiser, *noise_law(p, denoiser), lr=p.pretrain.lr, make_step=make_step)
    train_levels(run, GrowthRound(run.folder), [part], statistics, finish, export)
