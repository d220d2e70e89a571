"""From params.yaml to the settings of a training stage: pydantic sections into frozen dataclasses.

The packages below know neither params.yaml nor pydantic, so that they can be used, and tested, on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.config.params import Finetune, Params, Pretrain, Training
from pipeline.data.augment import LABELS, Augment
from pipeline.data.cache import Cache
from pipeline.data.dataset import PreparedDataset
from pipeline.data.degrade import Degrade
from pipeline.data.folders import FarFolder, changed
from pipeline.diffusion.generate import Generated, generate
from pipeline.diffusion.schedule import handover_of
from pipeline.errors import ConfigError
from pipeline.launch.worker import WorkerConfig
from pipeline.models.config import Lineage
from pipeline.models.denoiser import Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.snapshot import Snapshot
from pipeline.training.context import ProcessSettings, S, TrainContext
from pipeline.training.hooks import Intervals
from pipeline.training.levels import LevelSettings, NoiseLaw, core_noise, shell_noise

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def unpack(kind: type[Settings], source: object, **others: Any) -> Settings:
    """A settings dataclass: the fields that `source`, a section or another dataclass, has under the same name, and
    `others`."""
    names = [field.name for field in fields(kind) if hasattr(source, field.name)]
    return kind(**{name: getattr(source, name) for name in names} | others)


def open_data(config: WorkerConfig) -> PreparedDataset:
    """The prepared data that a worker reads. Raises Busy where they are not those that the driver has verified."""
    if config.data is None:
        dataset = PreparedDataset(config.root / "data/prepared")
        if config.prepared not in (None, dataset.digest):
            raise changed(dataset.where)
        return dataset
    assert config.cache is not None
    return PreparedDataset(FarFolder(config.data, Cache(Path(config.cache), int(config.cache_gib * 2**30))))


def train_context(
    stage: str,
    config: WorkerConfig,
    section: Training,
    settings: S,
    generate: Callable[..., Generated] = generate,
) -> TrainContext[S]:
    """The context of a stage, from its section of params.yaml and the settings unpacked from that."""
    dataset = open_data(config)
    process = unpack(ProcessSettings, config, threads=section.threads_per_shard)
    intervals = unpack(Intervals, section, watch_images=config.watch_images)
    return TrainContext(stage, settings, intervals, dataset, config.run_dir, process, generate)


def level_settings(config: WorkerConfig, section: Pretrain | Finetune) -> LevelSettings:
    """Settings of a stage that trains by the denoising loss."""
    p, on_gpu = config.params, torch.cuda.is_available()
    upscale = {}
    if isinstance(section, Finetune):
        upscale = {"degrade": Degrade(section.degrade.jpeg, section.degrade.blur)}
    return unpack(
        LevelSettings,
        section,
        seed=p.seed,
        augment=Augment(**p.augment.model_dump()),
        region_probability=p.regions.probability,
        bridge=p.regions.maps == "bridge",
        recorded=on_gpu and config.cuda_graphs and not config.recompute,
        compiled=on_gpu and config.compile,
        **upscale,
    )


def noise_law(params: Params, level: Denoiser) -> NoiseLaw:
    """How noise levels are drawn to train one level of a pyramid."""
    if isinstance(level, ShellDenoiser):
        octave = len(pyramid_levels(level)) - 2
        return shell_noise(level, params.finetune.p_std, handover_of(params.sampling.handover, octave))
    return core_noise(params.pretrain.p_mean, params.pretrain.p_std)


def conditioning_options(params: Params) -> dict[str, int | bool]:
    """Keyword values of a network that is conditioned on augmentation labels, and on noise levels by region."""
    return {
        "augment_labels": LABELS if params.augment.probability > 0 else 0,
        "regions": params.regions.probability > 0,
    }


def core_net(params: Params) -> dict[str, Any]:
    """Keyword values of the core's network."""
    return params.core.model_dump(mode="json", exclude={"resolution"}) | conditioning_options(params)


def shell_nets(params: Params) -> list[dict[str, Any]]:
    """Keyword values of each shell's network, coarse first."""
    options = {**conditioning_options(params), "bands": params.finetune.upscale_probability > 0}
    return [net | options for net in params.shell.nets()]


def nets_of(snapshot: Snapshot) -> list[Mapping[str, Any]]:
    """Keyword values of a model's networks, core first."""
    return [snapshot.config.core.net, *(shell.net for shell in snapshot.config.shells)]


def lineage_of(parent: Snapshot) -> Lineage:
    """The lineage of a model trained from `parent`, which knows what it was grown from."""
    known = parent.config.lineage
    return Lineage(parent=parent.digest, init_from=known.init_from, init_sha256=known.init_sha256)


def check_parent(parent: Snapshot, run: TrainContext[S]) -> None:
    """Raise ConfigError where a model was trained with another text encoder than the data's."""
    known, given = parent.config.text_encoder, run.dataset.text_encoder
    if known != given:
        name = next(name for name in {**given, **known} if known.get(name) != given.get(name))
        problem = (
            f"the text encoder's {name} is {known.get(name)} in the model, {given.get(name)} in the data"
        )
        fix = "prepare the data with the model's encoder"
        raise ConfigError("E-CFG-021", f"params.yaml: {run.stage}", problem, fix)
