"""Worker of the pretrain stage: the low-resolution core, trained from scratch or extracted from a pinned model."""

from collections.abc import Callable

from pipeline.config.params import Params
from pipeline.data.statistics import measure_statistics
from pipeline.launch.worker import WorkerConfig
from pipeline.models.config import Lineage, SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import build_core, pyramid_levels
from pipeline.models.snapshot import Snapshot, Weights, at_resolution, load_snapshot
from pipeline.training.context import GrowthRound, TrainContext
from pipeline.training.denoising import DenoisingStep
from pipeline.training.levels import LevelSettings, TrainedLevel, train_levels
from pipeline.workers.settings import (
    check_parent,
    core_net,
    level_settings,
    lineage_of,
    nets_of,
    noise_law,
    train_context,
)

# Of sample grids. Fixed, so that a change of `sampling` in params.yaml, which finetune stores in its model, does
# not make the core train again.
SAMPLING = SamplerSettings(
    num_steps=32,
    sampler="sde_dpmpp_2m",
    guide="unconditional",
    guidance=1.5,
    guidance_interval=(0.3, 5.0),
    handover=(8.0,),
    early_exit=False,
)
CURVES = {"": ["loss", "error"]}


def pretrain(config: WorkerConfig) -> None:
    """Train the core from scratch; or extract it from the model in `config.init`, which finetune is going to grow
    (what finetune.init_from pins)."""
    section = config.params.pretrain
    run = train_context("pretrain", config, section, level_settings(config, section))
    if config.init is None:
        train_core(run, config.params)
    else:
        extract_core(run, load_snapshot(config.init, run.device))


def extract_core(run: TrainContext[LevelSettings], origin: Snapshot) -> None:
    """Export the core inside a model."""
    check_parent(origin, run)
    core = at_resolution(origin, pyramid_levels(origin.denoiser)[0].resolution)
    config = run.snapshot_config(
        "core", core.denoiser, nets_of(core), origin.statistics, SAMPLING, lineage_of(core)
    )
    early = None if core.early is None else core.early.state_dict()
    run.export(core.denoiser, config, {"num_images": 0}, CURVES, early)


def train_core(
    run: TrainContext[LevelSettings],
    params: Params,
    make_step: Callable[..., DenoisingStep] = DenoisingStep,
) -> None:
    """Train and export the core; `make_step` replaces the update."""
    statistics = measure_statistics(run.dataset, params.core.resolution)
    net = core_net(params)
    denoiser = build_core(params.core.resolution, run.text_dim, net).to(run.device)

    def build_config() -> SnapshotConfig:
        return run.snapshot_config("core", denoiser, [net], statistics, SAMPLING, Lineage())

    def export(config: SnapshotConfig, metrics: dict[str, float], early: Weights | None) -> None:
        run.export(denoiser, config, metrics, CURVES, early)

    level = TrainedLevel(denoiser, noise_law(params, denoiser), run.settings.lr, make_step=make_step)
    train_levels(run, GrowthRound(run.folder), [level], statistics, build_config, export)
