"""One process of a training stage: build, resume, fit, export.

A worker gets a plain dict (`params`, `root`, `run_dir`, `precision`, `recompute`, `cuda_graphs`, `compile`,
`threads`), so that it can be sent to another machine. All state lives in `run_dir`; the finished model and its
reports in `run_dir/result`. Rank and world size come from torch.distributed where it is initialised.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.config import CORE_MODEL, Params, parse_params
from pipeline.data.augment import LABELS, Augment
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.degrade import Degrade, degrade
from pipeline.diffusion.ema import halflife_decay, power_decay
from pipeline.diffusion.noise import (
    LowBand,
    draw_low_band,
    lognormal_sigma,
    region_sigma,
    truncated_lognormal_sigma,
)
from pipeline.diffusion.sampling import generate, lift_of
from pipeline.errors import ConfigError, StorageError
from pipeline.models.denoiser import (
    PATCH,
    CoreDenoiser,
    Denoiser,
    ShellDenoiser,
    build_core,
    build_shell,
    pyramid_levels,
    set_dtype,
    set_recompute,
)
from pipeline.models.discriminator import CoreFeatures, FrozenFeatures, Heads, Lite0Features
from pipeline.models.kernels import mean_kernel_px, mixes
from pipeline.models.layers import Text, high_pass, pool
from pipeline.models.snapshot import (
    Snapshot,
    Statistics,
    Weights,
    at_resolution,
    describe,
    load_snapshot,
    save_snapshot,
)
from pipeline.rng import generator_for, key
from pipeline.training import checkpoint
from pipeline.training.adversarial import AdversarialStep, Guards, guard_state
from pipeline.training.averages import Averages, moments_of
from pipeline.training.fit import Hook, Step, fit
from pipeline.training.hooks import Checkpoints, Every, Progress, due, failpoint, read_records
from pipeline.training.optim import from_first_worker, world
from pipeline.training.state import Learner, TrainState
from pipeline.training.steps import DenoisingStep, DrawLow, DrawSigma, held_out_error, in_turn

SIGMA_MAX = 80.0  # of the core
FINISHED = 0.2  # share of patches that a shell sees without noise, in maps of regions
GRID = 8  # training captions in a sample grid, and as many held-out ones
BELOW_LR = 0.1  # learning rate of levels that are trained further while shells grow around them


class Run:
    """What every training stage needs: parameters, data, folders, device."""

    def __init__(self, stage: str, config: dict[str, Any]) -> None:
        self.stage = stage
        self.params: Params = parse_params(config["params"])
        self.section = getattr(self.params, stage)
        self.root = Path(config["root"])
        self.folder = Path(config["run_dir"])
        self.dataset = PreparedDataset(self.root / "data/prepared")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = precision(config["precision"], self.device)
        self.recompute = bool(config.get("recompute", False))
        graphs = bool(config.get("cuda_graphs", True))
        self.recorded = graphs and self.device.type == "cuda" and not self.recompute
        self.compiled = bool(config.get("compile", False)) and self.device.type == "cuda"
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling finds bugs, at 7% of a step. (Set by name: it is missing in torch's types.)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
        torch.manual_seed(key(self.params.seed, f"{stage}-weights"))

    def batches(self, resolution: int, augment: Augment | None = None) -> Batches:
        """The order of training; images are read at `resolution` if the data set has it, else at full size."""
        s = self.section
        return Batches(self.dataset, "train", self.params.seed, s.batch_size, s.shards, resolution, augment)

    @property
    def augment(self) -> Augment:
        """How the denoising stages vary their images."""
        return Augment(**self.params.augment.model_dump())

    def told(self) -> dict[str, int | bool]:
        """The keyword values of a network that is told how images were augmented, and of noise by region."""
        return {
            "augment_labels": LABELS if self.augment.probability > 0 else 0,
            "regions": self.params.regions.probability > 0,
        }

    def core_net(self) -> dict[str, Any]:
        """The keyword values of the core's network."""
        return self.params.core.model_dump(mode="json", exclude={"resolution"}) | self.told()

    def shell_nets(self) -> list[dict[str, Any]]:
        """The keyword values of each shell's network, coarse first."""
        more = {**self.told(), "bands": self.params.finetune.upscale_probability > 0}
        return [net | more for net in self.params.shell.nets()]

    def images_and_names(self, rows: Sequence[int]) -> tuple[Tensor, Text, list[str]]:
        """Images uint8, encoded names and names of some rows, on the device."""
        ids = [self.dataset.caption_of(row) for row in rows]
        images = self.dataset.images(torch.tensor(rows, dtype=torch.int64).numpy())
        names = [self.dataset.captions[i] if i >= 0 else "" for i in ids]
        return images.to(self.device), self.dataset.text(ids).to(self.device), names

    def pick(self, split: str, count: int) -> list[int]:
        """Up to `count` rows spread evenly over a split."""
        rows = self.dataset.split(split).tolist()
        return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows

    def train(
        self, state: TrainState, step: Step, hooks: Sequence[Hook], phase: "Phase | None" = None
    ) -> None:
        """Fit from the state's nimg to the end, with checkpoints; `hooks` begin with the progress file."""
        s, phase = self.section, phase or Phase(self.folder)

        def watched(state: TrainState) -> dict[str, Tensor]:
            failpoint("step", phase.start + state.nimg)
            return step(state)

        saver = Checkpoints(phase.folder / "checkpoints", s.checkpoint_images, s.batch_size)
        fit(state, watched, s.batch_size, s.num_images, [*hooks, saver])
        checkpoint.save(phase.folder / "checkpoints", state)

    def progress(self, nimg: int, phase: "Phase | None" = None) -> Progress:
        """The progress file, cut to what has been trained."""
        s, phase = self.section, phase or Phase(self.folder)
        path, total = self.folder / "progress.jsonl", phase.count * s.num_images
        return Progress(path, s.log_images, s.batch_size, total, nimg, phase.start)

    def snapshot_config(
        self, kind: str, denoiser: Denoiser, statistics: Statistics, parent: Snapshot | None, **more: Any
    ) -> dict[str, Any]:
        """config.json of the finished model."""
        p = self.params
        core = parent.config["core"]["net"] if parent else self.core_net()
        known = [shell["net"] for shell in parent.config["shells"]] if parent else []
        nets = [*known, *self.shell_nets()[len(known) : len(pyramid_levels(denoiser)) - 1]]
        return {
            "kind": kind,
            **describe(denoiser, core, nets),
            "text_encoder": self.dataset.text_encoder,
            "statistics": {"mean": list(statistics.mean), "std": list(statistics.std)},
            "sampling": p.sampling.model_dump(mode="json"),
            "lineage": {
                "data": artifacts.directory_digest(self.dataset.path),
                "validation": self.dataset.manifest["meta"]["validation"]["digest"],
                "parent": parent.digest if parent else None,
                **self.origin(kind, parent),
            },
            **more,
        }

    def origin(self, kind: str, parent: Snapshot | None) -> dict[str, str]:
        """Which model was grown: known of a fine-tuned model, and of those made of it."""
        if kind == "finetuned" and parent is not None:
            return {"init_from": self.params.finetune.init_from, "init_sha256": parent.digest}
        lineage = parent.config["lineage"] if parent else {}
        return {name: lineage[name] for name in ("init_from", "init_sha256") if name in lineage}

    def export(
        self,
        denoiser: Denoiser,
        config: dict[str, Any],
        metrics: Mapping[str, float],
        curves: Mapping[str, Sequence[str]],
        early: Weights | None = None,
    ) -> None:
        """Commit run_dir/result: the model, its curves, numbers and sample grid. Only rank 0 writes.

        `curves` has the metrics of each file curves{suffix}.csv; a suffix such as "_64" names a level below, which
        gets a sample grid as well."""
        if world()[0]:
            return
        records = read_records(self.folder / "progress.jsonl")
        parameters = sum(p.numel() for p in denoiser.parameters())
        with artifacts.commit_directory(self.folder / "result", {"stage": self.stage}) as folder:
            save_snapshot(folder / "model", denoiser, config, early)
            reports = folder / "reports"
            reports.mkdir()
            for suffix, names in curves.items():
                write_curves(reports / f"curves{suffix}.csv", records, names)
            numbers = {"parameters": parameters, "num_images": self.section.num_images, **metrics}
            (reports / "metrics.json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
            snapshot = load_snapshot(folder / "model", self.device)
            for loaded in (snapshot.denoiser, snapshot.early):
                if loaded is not None:
                    set_dtype(loaded, self.dtype)
            for suffix in curves:
                level = at_resolution(snapshot, int(suffix[1:] or snapshot.resolution))
                self.sample_grid(level, reports / f"samples{suffix}.png")
                self.kernel_picture(level, reports / f"kernels{suffix}.png")

    def kernel_picture(self, snapshot: Snapshot, path: Path) -> None:
        """Draw the mean effective kernel against ln sigma, on held-out images; nothing where kernels are off."""
        if not mixes(snapshot.denoiser):
            return
        images, text, _ = self.images_and_names(self.pick("val", GRID))
        images = snapshot.statistics.standardise(images)
        while images.shape[-1] > snapshot.resolution:
            images = pool(images)
        sigmas = torch.logspace(-2, 1, 13).tolist()
        noise = generator_for(self.params.seed, "kernels", device=self.device)
        curves = mean_kernel_px(snapshot.denoiser, images, text, sigmas, noise)
        save_kernels(path, sigmas, curves)

    def sample_grid(self, snapshot: Snapshot, path: Path, guide: str | None = None) -> None:
        """Draw samples of 8 training captions (above) and 8 held-out ones (below), fixed seeds."""
        rows = [*self.pick("train", GRID), *self.pick("val", GRID)]
        _, text, _ = self.images_and_names(rows)
        made = generate(snapshot, text, range(len(rows)), guide=guide)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, made.images, columns=8)


def precision(name: str, device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where the hardware computes in it (`auto`)."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write uint8 [N,3,R,R] as a PNG grid."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def save_kernels(path: Path, sigmas: Sequence[float], curves: dict[str, list[float]]) -> None:
    """Plot {block: mean effective kernel in px} against ln sigma."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for block, sizes in curves.items():
        axes.plot([math.log(sigma) for sigma in sigmas], sizes, marker=".", label=block)
    axes.set(xlabel="ln sigma", ylabel="mean effective kernel, px")
    axes.legend(fontsize=7)
    figure.savefig(path)


def write_curves(path: Path, records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Write the records that hold all of `names` as CSV over nimg; without times, so that runs compare."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["nimg", *names])
        for record in records:
            if all(name in record["metrics"] for name in names):
                writer.writerow([record["nimg"], *(f"{record['metrics'][name]:.6g}" for name in names)])


def chunks(rows: NDArray[np.int64], size: int = 1024) -> Iterator[NDArray[np.int64]]:
    """Rows in parts, so that a set of any size is measured in constant memory."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def measure_statistics(dataset: PreparedDataset, resolution: int) -> Statistics:
    """Mean and standard deviation per channel of the training images' box means at `resolution`."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for rows in chunks(dataset.split("train")):
        x = dataset.low_images(rows).double() / 127.5 - 1
        while x.shape[-1] > resolution:
            x = pool(x)
        total += x.sum(dim=(0, 2, 3))
        squares += x.square().sum(dim=(0, 2, 3))
        count += x[:, 0].numel()
    mean = total / count
    std = ((squares - count * mean.square()) / max(count - 1, 1)).clamp_min(0).sqrt().clamp_min(1e-3)
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))


def ema_decays(stds: Sequence[float]) -> dict[str, Callable[[int, int], float]]:
    """Decay functions of power-function averages, by name."""
    return {f"{std:g}": partial(power_decay, std) for std in stds}


@dataclass(frozen=True)
class Phase:
    """One of `count` rounds of training: its folder (checkpoints, averages, result), and the stage's clock at its
    start. A stage that trains in one round has no other folder than its own."""

    folder: Path
    start: int = 0
    count: int = 1

    @property
    def result(self) -> Path:
        """The finished model and its numbers, for the phases to come."""
        return self.folder / "result"

    def finished(self) -> bool:
        """Whether the result is there and verifies; a damaged one is made again."""
        try:
            artifacts.verify_directory(self.result)
        except StorageError:
            return False
        return True


@dataclass(frozen=True)
class Part:
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


def train_parts(
    run: Run,
    phase: Phase,
    parts: Sequence[Part],
    statistics: Statistics,
    finish: Callable[[], dict[str, Any]],
    export: Callable[[dict[str, Any], dict[str, float], Weights | None], None],
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
            draw_sigma=by_region(part.level, p.regions.probability, part.draw_sigma, part.sigma_max),
            seed=p.seed,
            batch_size=s.batch_size,
            shards=s.shards,
            lr=part.lr,
            warmup_images=s.warmup_images,
            num_images=s.num_images,
            text_dropout=s.text_dropout,
            draw_low=by_band(run, part.level, statistics),
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
        if world()[0]:
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
            run.sample_grid(Snapshot(denoiser, finish(), ""), path, guide="no_text")

    moments = moments_of(s.num_images, s.batch_size, s.ema_moments)
    averages = [
        Averages(phase.folder / f"averages{part.suffix}", learner, moments)
        for part, learner in zip(parts, learners, strict=True)
    ]
    hooks: list[Hook] = [progress, *averages, keep_early, Every(s.sample_images, s.batch_size, look)]
    run.train(state, in_turn(steps[::-1]), hooks, phase)
    if world()[0]:
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
        export({**finish(), "ema_std": std}, numbers, early)


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


def by_region(
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


def by_band(run: Run, level: Denoiser, statistics: Statistics) -> DrawLow | None:
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


def pretrain(config: dict[str, Any]) -> None:
    """Train the low-resolution core from scratch; or take it out of the model in the folder `config["init"]`, which
    `finetune` is going to grow (what finetune.init_from pins)."""
    run = Run("pretrain", config)
    if "init" in config:
        take_core(run, load_snapshot(config["init"], run.device))
    else:
        train_core(run)


def take_core(run: Run, origin: Snapshot) -> None:
    """Export the core inside of a model."""
    check_parent(origin, run)
    core = at_resolution(origin, pyramid_levels(origin.denoiser)[0].resolution)
    config = run.snapshot_config("core", core.denoiser, origin.statistics, core)
    early = None if core.early is None else core.early.state_dict()
    run.export(core.denoiser, config, {"num_images": 0}, {"": ["loss", "error"]}, early)


def train_core(run: Run, make_step: Callable[..., DenoisingStep] = DenoisingStep) -> None:
    """`pretrain`, with another update if one is given."""
    p = run.params
    statistics = measure_statistics(run.dataset, p.core.resolution)
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    denoiser = build_core(p.core.resolution, text_dim, run.core_net()).to(run.device)

    def finish() -> dict[str, Any]:
        return run.snapshot_config("core", denoiser, statistics, None)

    def export(config: dict[str, Any], numbers: dict[str, float], early: Weights | None) -> None:
        run.export(denoiser, config, numbers, {"": ["loss", "error"]}, early)

    part = Part(denoiser, *noise_law(p, denoiser), lr=p.pretrain.lr, make_step=make_step)
    train_parts(run, Phase(run.folder), [part], statistics, finish, export)


def noise_law(p: Params, level: Denoiser) -> tuple[DrawSigma, float]:
    """How the noise levels of one level of the pyramid are drawn, and how high they go."""
    if isinstance(level, CoreDenoiser):
        return partial(_lognormal, p.pretrain.p_mean, p.pretrain.p_std), SIGMA_MAX
    sigma = level.sigma_high_band
    top = 2 * lift_of(p.sampling.lift, len(pyramid_levels(level)) - 2) * sigma
    return partial(_truncated, math.log(0.9 * sigma), p.finetune.p_std, top), top


def _lognormal(p_mean: float, p_std: float, batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, p_mean, p_std, generator)


def high_band_variances(
    dataset: PreparedDataset, statistics: Statistics, resolutions: Sequence[int]
) -> dict[int, float]:
    """4/3 mean(HP x)^2 of the standardised training images at some resolutions: the variance per dimension that the
    high band keeps."""
    totals, counts = dict.fromkeys(resolutions, 0.0), dict.fromkeys(resolutions, 0)
    for rows in chunks(dataset.split("train")):
        x = statistics.standardise(dataset.images(rows))
        while x.shape[-1] >= min(resolutions):
            if x.shape[-1] in totals:
                high = high_pass(x).double()
                totals[x.shape[-1]] += float(high.square().sum())
                counts[x.shape[-1]] += high.numel()
            x = pool(x)
    return {resolution: totals[resolution] / counts[resolution] * 4 / 3 for resolution in resolutions}


def finetune(config: dict[str, Any]) -> None:
    """Grow shells around a trained model, from its resolution to data.resolution.

    The model is that in the folder `config["init"]` (what finetune.init_from pins), or models/core."""
    run = Run("finetune", config)
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
        phase = Phase(run.folder / f"to-{fresh[-1]}", i * s.num_images, len(rounds))
        last = i + 1 == len(rounds)
        if last or not phase.finished():
            denoiser = grow(run, grown.denoiser, fresh, variances, anew=i > 0)
            grow_phase(run, phase, denoiser, fresh, origin, grown, numbers, last)
        if not last:
            from_first_worker(torch.zeros(1, device=run.device))  # it has written the result
            grown = load_snapshot(phase.result / "model", run.device)
            numbers |= json.loads((phase.result / "metrics.json").read_text())


def grow(
    run: Run, below: Denoiser, resolutions: Sequence[int], variances: Mapping[int, float], anew: bool
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


def grow_phase(
    run: Run,
    phase: Phase,
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
            parts.append(Part(level, *noise_law(p, level), s.lr if new else BELOW_LR * s.lr, suffix, new))
        if isinstance(level, ShellDenoiser):
            level.joint = s.core == "joint"

    def finish() -> dict[str, Any]:
        return run.snapshot_config("finetuned", denoiser, origin.statistics, origin)

    def export(config: dict[str, Any], found: dict[str, float], early: Weights | None) -> None:
        if last:
            everything = {**numbers, **found}
            suffixes = [name.removeprefix("ema_std") for name in everything if name.startswith("ema_std")]
            curves = {suffix: [f"loss{suffix}", f"error{suffix}"] for suffix in suffixes}
            run.export(denoiser, config, everything, curves, early)
            return
        with artifacts.commit_directory(phase.result, {"stage": run.stage}) as folder:
            save_snapshot(folder / "model", denoiser, config, early)
            (folder / "metrics.json").write_text(json.dumps(found))

    train_parts(run, phase, parts, origin.statistics, finish, export, grown)


def _truncated(p_mean: float, p_std: float, top: float, batch: int, generator: torch.Generator) -> Tensor:
    return truncated_lognormal_sigma(batch, p_mean, p_std, top, generator)


def check_parent(parent: Snapshot, run: Run) -> None:
    """Raise ConfigError where a model knows other captions than the data."""
    known, given = parent.config["text_encoder"], run.dataset.text_encoder
    if known != given:
        name = next(name for name in {**given, **known} if known.get(name) != given.get(name))
        problem = (
            f"the text encoder's {name} is {known.get(name)} in the model, {given.get(name)} in the data"
        )
        fix = "prepare the data with the model's encoder"
        raise ConfigError("E-CFG-021", f"params.yaml: {run.stage}", problem, fix)


def check_growth(origin: Snapshot, run: Run) -> None:
    """Raise ConfigError where the model to grow does not fit the parameters or the data."""
    p, s = run.params, run.params.finetune
    where, other = f"params.yaml: {run.stage}.init_from", "or start from another model (`crescendo pin`)"
    if origin.resolution >= p.data.resolution:
        problem = f"the model to grow makes {origin.resolution} px, data.resolution is {p.data.resolution}"
        raise ConfigError("E-CFG-020", where, problem, f"raise data.resolution, {other}")
    check_parent(origin, run)
    config, shells = origin.config, p.shell.nets()
    core = p.core.model_dump(mode="json", exclude={"resolution"})
    pairs = [("core", {"resolution": p.core.resolution, **core}, {**config["core"], **config["core"]["net"]})]
    # Only the shells that the model to grow has: the others are new.
    pairs += [("shell", net, shell["net"]) for net, shell in zip(shells, config["shells"], strict=False)]
    for section, wanted, built in pairs:
        for name in wanted:
            if wanted[name] != built.get(name, wanted[name]):  # what an older model does not name, it has not
                problem = (
                    f"{section}.{name} is {built[name]} in the model to grow, {wanted[name]} in params.yaml"
                )
                raise ConfigError("E-CFG-024", where, problem, f"write {built[name]} there, {other}")
    told = config["core"]["net"]
    for name, section in (("regions", "regions"), ("augment_labels", "augment")):
        if run.told()[name] and run.told()[name] != told.get(name):
            problem = f"the model to grow was trained without {section} ({section}.probability 0)"
            raise ConfigError("E-CFG-022", where, problem, f"set {section}.probability to 0, {other}")
    if s.early_images and origin.early is None:
        problem = "the model to grow has no early weights, which the guide of its core needs"
        raise ConfigError(
            "E-CFG-023", "params.yaml: finetune.early_images", problem, "set pretrain.early_images"
        )


def refine(config: dict[str, Any]) -> None:
    """Adversarial refinement into a model of few passes; keeps the best state that the guards saw."""
    run = Run("refine", config)
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

    def finish() -> dict[str, Any]:
        more = {"passes": list(s.passes), "sigma_start": s.sigma_start}
        return run.snapshot_config("refined", student, parent.statistics, parent, **more)

    def look(state: TrainState) -> None:
        if world()[0] == 0:
            with generator.using(generator.emas["ema"]):
                snapshot = Snapshot(student, finish(), "")
                run.sample_grid(snapshot, run.folder / "samples" / f"nimg-{state.nimg:012d}.png")

    run.train(state, step, [progress, check, Every(s.sample_images, s.batch_size, look)])
    names = ("lr_scale", "rollbacks", "score", "best_nimg")
    metrics = dict(zip(names, state.extra["guard"][:4].tolist(), strict=True))
    with generator.using(state.extra["best"]):
        run.export(student, finish(), metrics, {"": ["generator_loss", "discriminator_loss", "anchor"]})
