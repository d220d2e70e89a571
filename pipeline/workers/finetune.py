"""Worker of the finetune stage: shells around a trained model, one per octave, up to data.resolution."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import artifacts
from pipeline.config.params import CORE_MODEL, Params
from pipeline.data.statistics import high_band_variances
from pipeline.errors import ConfigError
from pipeline.launch.worker import WorkerConfig
from pipeline.models.config import Lineage, SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import Denoiser, ShellDenoiser, build_shell, pyramid_levels
from pipeline.models.finite import require_finite_metrics
from pipeline.models.snapshot import Snapshot, Weights, load_snapshot, save_snapshot
from pipeline.rng import key
from pipeline.training.context import GrowthRound, TrainContext
from pipeline.training.distributed import broadcast
from pipeline.training.levels import LevelSettings, TrainedLevel, train_levels
from pipeline.workers.settings import (
    check_parent,
    conditioning_options,
    level_settings,
    nets_of,
    noise_law,
    shell_nets,
    train_context,
)

BELOW_LR = 0.1  # learning rate, as a multiple, of levels that keep learning below new shells


def finetune(config: WorkerConfig) -> None:
    """Grow shells around a trained model, from its resolution to data.resolution.

    The model is the one in `config.init` (what finetune.init_from pins), or models/core. Octaves are trained in one
    round each, or all together in one (finetune.order); a round that has finished is not trained again."""
    section = config.params.finetune
    run = train_context("finetune", config, section, level_settings(config, section))
    origin = load_snapshot(config.init or config.root / CORE_MODEL, run.device)
    check_growth(origin, run, config.params)
    rounds = growth_rounds(config.params, origin.resolution)
    variances = high_band_variances(run.dataset, origin.statistics, [px for fresh in rounds for px in fresh])
    growing = Growing(run, config.params, origin, variances)
    metrics: dict[str, float] = {}
    grown = origin
    for i, fresh in enumerate(rounds):
        images = section.num_images
        growth = GrowthRound(run.folder / f"to-{fresh[-1]}", i * images, len(rounds) * images)
        last = i + 1 == len(rounds)
        if last or not growth.finished():
            denoiser = growing.add_shells(grown.denoiser, fresh, new_streams=i > 0)
            growing.train_round(growth, denoiser, fresh, grown, metrics if last else None)
        if not last:
            broadcast(torch.zeros(1, device=run.device))  # waits for the first worker to write the result
            grown = load_snapshot(growth.result / "model", run.device)
            metrics |= json.loads((growth.result / "metrics.json").read_text())


def growth_rounds(params: Params, start: int) -> list[list[int]]:
    """The resolutions of the new shells in each round, for a model of `start` px."""
    num_octaves = (params.data.resolution // start).bit_length() - 1
    octaves = [start * 2**i for i in range(1, num_octaves + 1)]
    together = params.finetune.order == "together" and octaves
    return [octaves] if together else [[resolution] for resolution in octaves]


def is_trained(params: Params, resolution: int, fresh: Sequence[int]) -> bool:
    """Whether a round that adds the shells `fresh` trains the level of a resolution."""
    return resolution in fresh or params.finetune.core != "frozen"


@dataclass(frozen=True)
class Growing:
    """A growth of `origin` by shells. variances: of the high band of the training images, by resolution."""

    run: TrainContext[LevelSettings]
    params: Params
    origin: Snapshot
    variances: Mapping[int, float]

    def add_shells(self, below: Denoiser, resolutions: Sequence[int], new_streams: bool) -> Denoiser:
        """Fresh shells around `below`. The first shell of the stage draws its weights from the stage's own random
        stream; the others (all, where `new_streams`) have one each."""
        run, nets = self.run, shell_nets(self.params)
        for i, resolution in enumerate(resolutions):
            if new_streams or i:
                torch.manual_seed(key(run.settings.seed, f"{run.stage}-weights", resolution))
            net = nets[len(pyramid_levels(below)) - 1]
            below = build_shell(below, run.text_dim, self.variances[resolution], net)
        return below.to(run.device)

    def levels(self, denoiser: Denoiser, fresh: Sequence[int]) -> list[TrainedLevel]:
        """The levels of `denoiser` to train: the `fresh` ones, and those below as finetune.core says."""
        s, levels = self.params.finetune, []
        for level in pyramid_levels(denoiser):
            if is_trained(self.params, level.resolution, fresh):
                new = level.resolution in fresh
                suffix = "" if level.resolution == self.params.data.resolution else f"_{level.resolution}"
                lr = s.lr if new else BELOW_LR * s.lr
                levels.append(TrainedLevel(level, noise_law(self.params, level), lr, suffix, new))
            if isinstance(level, ShellDenoiser):
                level.joint = s.core == "joint"
        return levels

    def snapshot_config(self, denoiser: Denoiser) -> SnapshotConfig:
        """config.json of the grown model."""
        p, origin = self.params, self.origin
        known = nets_of(origin)
        nets = [*known, *shell_nets(p)[len(known) - 1 : len(pyramid_levels(denoiser)) - 1]]
        lineage = Lineage(parent=origin.digest, init_from=p.finetune.init_from, init_sha256=origin.digest)
        sampling = SamplerSettings(**p.sampling.model_dump())
        return self.run.snapshot_config("finetuned", denoiser, nets, origin.statistics, sampling, lineage)

    def train_round(
        self,
        growth: GrowthRound,
        denoiser: Denoiser,
        fresh: Sequence[int],
        grown: Snapshot,
        earlier: Mapping[str, float] | None,
    ) -> None:
        """Train `denoiser`, which is `grown` with `fresh` shells. Commit the round's result; or, in the last round,
        the stage's result with the metrics of `earlier` rounds, which are None in all but the last."""
        run = self.run

        def build_config() -> SnapshotConfig:
            return self.snapshot_config(denoiser)

        def export(config: SnapshotConfig, metrics: dict[str, float], early: Weights | None) -> None:
            if earlier is not None:
                metrics = {**earlier, **metrics}
                suffixes = [name.removeprefix("ema_std") for name in metrics if name.startswith("ema_std")]
                curves = {suffix: [f"loss{suffix}", f"error{suffix}"] for suffix in suffixes}
                run.export(denoiser, config, metrics, curves, early)
                return
            require_finite_metrics(metrics, f"{run.stage}: metrics.json", "lower the learning rate")
            with artifacts.commit_directory(growth.result, {"stage": run.stage}) as folder:
                save_snapshot(folder / "model", denoiser, config, early)
                (folder / "metrics.json").write_text(json.dumps(metrics))

        levels = self.levels(denoiser, fresh)
        train_levels(run, growth, levels, self.origin.statistics, build_config, export, grown)


def check_growth(origin: Snapshot, run: TrainContext[LevelSettings], params: Params) -> None:
    """Raise ConfigError where the model to grow does not fit the parameters or the data."""
    p, s = params, params.finetune
    where, other = f"params.yaml: {run.stage}.init_from", "or start from another model (`crescendo pin`)"
    if origin.resolution >= p.data.resolution:
        problem = f"the model to grow makes {origin.resolution} px, data.resolution is {p.data.resolution}"
        raise ConfigError("E-CFG-020", where, problem, f"raise data.resolution, {other}")
    check_parent(origin, run)
    config, shells = origin.config, p.shell.nets()
    core = p.core.model_dump(mode="json", exclude={"resolution"})
    built_core = {"resolution": config.core.resolution, **config.core.net}
    pairs: list[tuple[str, dict[str, Any], Mapping[str, Any]]] = [
        ("core", {"resolution": p.core.resolution, **core}, built_core)
    ]
    # Only the shells that the model to grow has: the others are new.
    pairs += [("shell", net, shell.net) for net, shell in zip(shells, config.shells, strict=False)]
    for section, wanted, built in pairs:
        for name in wanted:
            # An older model lacks the features that its config does not name.
            if wanted[name] != built.get(name, wanted[name]):
                problem = (
                    f"{section}.{name} is {built[name]} in the model to grow, {wanted[name]} in params.yaml"
                )
                raise ConfigError("E-CFG-024", where, problem, f"write {built[name]} there, {other}")
    options, known = conditioning_options(p), config.core.net
    for name, section in (("regions", "regions"), ("augment_labels", "augment")):
        if options[name] and options[name] != known.get(name):
            problem = f"the model to grow was trained without {section} ({section}.probability 0)"
            raise ConfigError("E-CFG-022", where, problem, f"set {section}.probability to 0, {other}")
    if s.early_images and origin.early is None:
        problem = "the model to grow has no early weights, which the guide of its core needs"
        raise ConfigError(
            "E-CFG-023", "params.yaml: finetune.early_images", problem, "set pretrain.early_images"
        )
