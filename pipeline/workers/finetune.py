"""Worker of the finetune stage: shells around a trained model, one an octave."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline import artifacts
from pipeline.config.params import CORE_MODEL
from pipeline.data.statistics import high_band_variances
from pipeline.errors import ConfigError
from pipeline.models.config import SnapshotConfig
from pipeline.models.denoiser import Denoiser, ShellDenoiser, build_shell, pyramid_levels
from pipeline.models.snapshot import Snapshot, Weights, load_snapshot, save_snapshot
from pipeline.rng import key
from pipeline.training.context import GrowthRound, TrainContext, check_parent
from pipeline.training.distributed import broadcast
from pipeline.training.levels import TrainedLevel, noise_law, train_levels

BELOW_LR = 0.1  # learning rate of levels that are trained further while shells grow around them


def finetune(config: dict[str, Any]) -> None:
    """Grow shells around a trained model, from its resolution to data.resolution.

    The model is that in the folder `config["init"]` (what finetune.init_from pins), or models/core."""
    run = TrainContext("finetune", config)
    p, s = run.params, run.params.finetune
    origin = load_snapshot(config.get("init", run.root / CORE_MODEL), run.device)
    check_growth(origin, run)
    num_octaves = (p.data.resolution // origin.resolution).bit_length() - 1
    octaves = [origin.resolution * 2**i for i in range(1, num_octaves + 1)]
    rounds = [octaves] if s.order == "together" else [[resolution] for resolution in octaves]
    variances = high_band_variances(run.dataset, origin.statistics, octaves)
    numbers: dict[str, float] = {}
    grown = origin
    for i, fresh in enumerate(rounds):
        phase = GrowthRound(run.folder / f"to-{fresh[-1]}", i * s.num_images, len(rounds))
        last = i + 1 == len(rounds)
        if last or not phase.finished():
            denoiser = grow(run, grown.denoiser, fresh, variances, anew=i > 0)
            train_round(run, phase, denoiser, fresh, origin, grown, numbers, last)
        if not last:
            broadcast(torch.zeros(1, device=run.device))  # it has written the result
            grown = load_snapshot(phase.result / "model", run.device)
            numbers |= json.loads((phase.result / "metrics.json").read_text())


def grow(
    run: TrainContext, below: Denoiser, resolutions: Sequence[int], variances: Mapping[int, float], anew: bool
) -> Denoiser:
    """New shells around `below`. The first shell of a stage draws its weights from the stage's own stream, the
    others (`anew`, and all but the first of `resolutions`) each from one of their own."""
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    for i, resolution in enumerate(resolutions):
        if anew or i:
            torch.manual_seed(key(run.params.seed, f"{run.stage}-weights", resolution))
        net = run.shell_nets()[len(pyramid_levels(below)) - 1]
        below = build_shell(below, text_dim, variances[resolution], net)
    return below.to(run.device)


def train_round(
    run: TrainContext,
    phase: GrowthRound,
    denoiser: Denoiser,
    fresh: Sequence[int],
    origin: Snapshot,
    grown: Snapshot,
    numbers: Mapping[str, float],
    last: bool,
) -> None:
    """Train the `fresh` levels of `denoiser`, which is `grown` with new shells, and those below as finetune.core
    says; commit the phase's result or, with the `numbers` of those before, the stage's."""
    p, s = run.params, run.params.finetune
    parts = []
    for level in pyramid_levels(denoiser):
        new = level.resolution in fresh
        if new or s.core != "frozen":
            suffix = "" if level.resolution == p.data.resolution else f"_{level.resolution}"
            parts.append(
                TrainedLevel(level, *noise_law(p, level), s.lr if new else BELOW_LR * s.lr, suffix, new)
            )
        if isinstance(level, ShellDenoiser):
            level.joint = s.core == "joint"

    def finish() -> SnapshotConfig:
        return run.snapshot_config("finetuned", denoiser, origin.statistics, origin)

    def export(config: SnapshotConfig, found: dict[str, float], early: Weights | None) -> None:
        if last:
            everything = {**numbers, **found}
            suffixes = [name.removeprefix("ema_std") for name in everything if name.startswith("ema_std")]
            curves = {suffix: [f"loss{suffix}", f"error{suffix}"] for suffix in suffixes}
            run.export(denoiser, config, everything, curves, early)
            return
        with artifacts.commit_directory(phase.result, {"stage": run.stage}) as folder:
            save_snapshot(folder / "model", denoiser, config, early)
            (folder / "metrics.json").write_text(json.dumps(found))

    train_levels(run, phase, parts, origin.statistics, finish, export, grown)


def check_growth(origin: Snapshot, run: TrainContext) -> None:
    """Raise ConfigError where the model to grow does not fit the parameters or the data."""
    p, s = run.params, run.params.finetune
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
            if wanted[name] != built.get(name, wanted[name]):  # what an older model does not name, it has not
                problem = (
                    f"{section}.{name} is {built[name]} in the model to grow, {wanted[name]} in params.yaml"
                )
                raise ConfigError("E-CFG-024", where, problem, f"write {built[name]} there, {other}")
    for name, section in (("regions", "regions"), ("augment_labels", "augment")):
        if run.conditioning_options()[name] and run.conditioning_options()[name] != config.core.net.get(name):
            problem = f"the model to grow was trained without {section} ({section}.probability 0)"
            raise ConfigError("E-CFG-022", where, problem, f"set {section}.probability to 0, {other}")
    if s.early_images and origin.early is None:
        problem = "the model to grow has no early weights, which the guide of its core needs"
        raise ConfigError(
            "E-CFG-023", "params.yaml: finetune.early_images", problem, "set pretrain.early_images"
        )
