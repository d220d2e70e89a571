"""One process of a training stage: build, resume, fit, export.

A worker gets a plain dict (`params`, `root`, `run_dir`, `precision`, `recompute`, `threads`), so that it can be
sent to another machine. All state lives in `run_dir`; the finished model and its reports in `run_dir/result`.
Rank and world size come from torch.distributed where it is initialised.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.config import Params, parse_params
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
from pipeline.diffusion.sampling import generate
from pipeline.errors import ConfigError
from pipeline.models.denoiser import (
    PATCH,
    Denoiser,
    ShellDenoiser,
    build_core,
    build_shell,
    levels,
    set_dtype,
    set_recompute,
)
from pipeline.models.discriminator import CoreFeatures, FrozenFeatures, Heads, Lite0Features
from pipeline.models.kernels import mean_kernel_px
from pipeline.models.layers import Text, high_pass, pool
from pipeline.models.snapshot import Snapshot, Statistics, Weights, describe, load_snapshot, save_snapshot
from pipeline.rng import generator_for, key
from pipeline.training import checkpoint
from pipeline.training.adversarial import AdversarialStep, Guards, guard_state
from pipeline.training.averages import Averages, moments_of
from pipeline.training.fit import Hook, Step, fit
from pipeline.training.hooks import Checkpoints, Every, Progress, due, failpoint, read_records
from pipeline.training.optim import world
from pipeline.training.state import Learner, TrainState
from pipeline.training.steps import DenoisingStep, DrawLow, held_out_error

SIGMA_MAX = 80.0  # of the core
FINISHED = 0.2  # share of patches that a shell sees without noise, in maps of regions
GRID = 8  # training captions in a sample grid, and as many held-out ones


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

    def shell_net(self) -> dict[str, Any]:
        """The keyword values of the shell that the finetune stage grows."""
        bands = {"bands": self.params.finetune.upscale_probability > 0}
        return self.params.shell.model_dump(mode="json") | self.told() | bands

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

    def train(self, state: TrainState, step: Step, hooks: Sequence[Hook], progress: Progress) -> None:
        """Fit from the state's nimg to the end, with checkpoints and the progress file."""
        s = self.section

        def watched(state: TrainState) -> dict[str, Tensor]:
            failpoint("step", state.nimg)
            return step(state)

        saver = Checkpoints(self.folder / "checkpoints", s.checkpoint_images, s.batch_size)
        fit(state, watched, s.batch_size, s.num_images, [progress, *hooks, saver])
        checkpoint.save(self.folder / "checkpoints", state)

    def progress(self, nimg: int) -> Progress:
        """The progress file, cut to what has been trained."""
        s = self.section
        return Progress(self.folder / "progress.jsonl", s.log_images, s.batch_size, s.num_images, nimg)

    def snapshot_config(
        self, kind: str, denoiser: Denoiser, statistics: Statistics, parent: Snapshot | None, **more: Any
    ) -> dict[str, Any]:
        """config.json of the finished model."""
        p = self.params
        core = p.core.model_dump(mode="json", exclude={"resolution"}) | self.told()
        shells = parent.config["shells"] if parent else []
        nets = [shell["net"] for shell in shells]
        if kind == "finetuned":
            nets = [*nets, self.shell_net()]
        core = parent.config["core"]["net"] if parent else core
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
            },
            **more,
        }

    def export(
        self,
        denoiser: Denoiser,
        config: dict[str, Any],
        metrics: dict[str, float],
        curve: Sequence[str],
        early: Weights | None = None,
    ) -> None:
        """Commit run_dir/result: the model, its curves, numbers and sample grid. Only rank 0 writes."""
        if world()[0]:
            return
        records = read_records(self.folder / "progress.jsonl")
        parameters = sum(p.numel() for p in denoiser.parameters())
        with artifacts.commit_directory(self.folder / "result", {"stage": self.stage}) as folder:
            save_snapshot(folder / "model", denoiser, config, early)
            reports = folder / "reports"
            reports.mkdir()
            write_curves(reports / "curves.csv", records, curve)
            numbers = {**metrics, "parameters": parameters, "num_images": self.section.num_images}
            (reports / "metrics.json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
            snapshot = load_snapshot(folder / "model", self.device)
            for loaded in (snapshot.denoiser, snapshot.early):
                if loaded is not None:
                    set_dtype(loaded, self.dtype)
            self.sample_grid(snapshot, reports / "samples.png")
            self.kernel_picture(snapshot, reports / "kernels.png")

    def kernel_picture(self, snapshot: Snapshot, path: Path) -> None:
        """Draw the mean effective kernel against ln sigma, on held-out images; nothing where kernels are off."""
        images, text, _ = self.images_and_names(self.pick("val", GRID))
        images = snapshot.statistics.standardise(images)
        while images.shape[-1] > snapshot.resolution:
            images = pool(images)
        sigmas = torch.logspace(-2, 1, 13).tolist()
        noise = generator_for(self.params.seed, "kernels", device=self.device)
        curves = mean_kernel_px(snapshot.denoiser, images, text, sigmas, noise)
        if curves:
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


def denoising_stage(
    run: Run,
    denoiser: Denoiser,
    trained: nn.Module,
    statistics: Statistics,
    draw_sigma: Callable[[int, torch.Generator], Tensor],
    sigma_max: float,
    finish: Callable[[], dict[str, Any]],
    parent: Snapshot | None = None,
    draw_low: DrawLow | None = None,
) -> None:
    """Train `trained` (all or part of `denoiser`, grown from `parent`) on the denoising loss, choose the weight
    average with the least held-out error, and export; `finish` gives the snapshot's config.

    Levels come from `draw_sigma`; with regions they are spread over patches, up to `sigma_max`. The held-out
    error is that of whole images at one level at all times, so that it compares."""
    s, p = run.section, run.params
    set_dtype(denoiser, run.dtype)
    set_recompute(denoiser, run.recompute)
    learner = Learner(trained, (0.9, 0.99), ema_decays(s.ema_std))
    state = TrainState({"net": learner})
    first = next(iter(learner.emas))
    if s.early_images:
        state.extra["early"] = learner.emas[first].clone()
    checkpoint.resume(run.folder / "checkpoints", state)
    step = DenoisingStep(
        denoiser=denoiser,
        batches=run.batches(denoiser.resolution, run.augment),
        statistics=statistics,
        draw_sigma=by_region(denoiser, p.regions.probability, draw_sigma, sigma_max),
        seed=p.seed,
        batch_size=s.batch_size,
        shards=s.shards,
        lr=s.lr,
        warmup_images=s.warmup_images,
        num_images=s.num_images,
        text_dropout=s.text_dropout,
        draw_low=draw_low,
    )
    held_out, names, _ = run.images_and_names(run.pick("val", 64))
    held_out = step.standardise(held_out)

    def error_of(average: Tensor) -> float:
        trained.eval()
        with learner.using(average):
            error = held_out_error(denoiser, held_out, names, draw_sigma, p.seed)
        trained.train()
        return error

    progress = run.progress(state.nimg)

    def keep_early(state: TrainState, _: dict[str, Tensor]) -> None:
        if state.nimg - s.batch_size < s.early_images <= state.nimg:
            state.extra["early"].copy_(learner.emas[first])

    def look(state: TrainState) -> None:
        if world()[0] == 0:
            progress.write(state.nimg, {"held_out_error": error_of(learner.emas[first])})
            with learner.using(learner.emas[first]):
                trained.eval()
                snapshot = Snapshot(denoiser, finish(), "")
                path = run.folder / "samples" / f"nimg-{state.nimg:012d}.png"
                run.sample_grid(snapshot, path, guide="no_text")  # the others come with the finished model
                trained.train()

    moments = moments_of(s.num_images, s.batch_size, s.ema_moments)
    averages = Averages(run.folder / "averages", learner, moments)
    trained.train()
    run.train(state, step, [averages, keep_early, Every(s.sample_images, s.batch_size, look)], progress)
    if world()[0]:
        return
    measured = ((error_of(average), std, average) for std, average in averages.candidates())
    error, std, best = min(measured, key=lambda candidate: candidate[0])
    metrics = {"held_out_error": error, "ema_std": std}
    trained.eval()
    early = early_weights(denoiser, learner, state.extra["early"], parent) if s.early_images else None
    with learner.using(best):
        run.export(denoiser, {**finish(), "ema_std": std}, metrics, ["loss", "error"], early)


def early_weights(denoiser: Denoiser, learner: Learner, kept: Tensor, parent: Snapshot | None) -> Weights:
    """The state of `denoiser` with the early weights of what `learner` trained, and those of its parent below."""
    with learner.using(kept):
        weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    if parent is not None and parent.early is not None:
        weights |= {f"below.{name}": tensor for name, tensor in parent.early.state_dict().items()}
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
    grid = levels(denoiser)[0].resolution // PATCH
    finished = FINISHED if isinstance(denoiser, ShellDenoiser) else 0.0

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        sigma = draw_sigma(batch, generator)
        return region_sigma(sigma, grid, probability, generator, sigma_max, finished=finished)

    return draw


def pretrain(config: dict[str, Any]) -> None:
    """Train the low-resolution core from scratch."""
    run = Run("pretrain", config)
    p, s = run.params, run.params.pretrain
    statistics = measure_statistics(run.dataset, p.core.resolution)
    net = p.core.model_dump(mode="json", exclude={"resolution"}) | run.told()
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    denoiser = build_core(p.core.resolution, text_dim, net).to(run.device)
    draw = partial(_lognormal, s.p_mean, s.p_std)

    def finish() -> dict[str, Any]:
        return run.snapshot_config("core", denoiser, statistics, None)

    denoising_stage(run, denoiser, denoiser, statistics, draw, SIGMA_MAX, finish)


def _lognormal(p_mean: float, p_std: float, batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, p_mean, p_std, generator)


def high_band_variance(dataset: PreparedDataset, statistics: Statistics) -> float:
    """4/3 mean(HP x)^2 of the standardised training images: variance per dimension that the high band keeps."""
    total, count = 0.0, 0
    for rows in chunks(dataset.split("train")):
        high = high_pass(statistics.standardise(dataset.images(rows))).double()
        total += float(high.square().sum())
        count += high.numel()
    return total / count * 4 / 3


def finetune(config: dict[str, Any]) -> None:
    """Grow a shell around a frozen, trained model: one octave more."""
    run = Run("finetune", config)
    p, s = run.params, run.params.finetune
    parent = load_snapshot(run.root / s.init_from, run.device)
    check_parent(parent, run, p.data.resolution // 2)
    if p.regions.probability > 0 and levels(parent.denoiser)[0].difficulty is None:
        problem = "the model to grow was trained without regions (regions.probability 0)"
        raise ConfigError(
            "E-CFG-022", "params.yaml: regions", problem, "set it to 0, or train that model anew"
        )
    if s.early_images and parent.early is None:
        problem = "the model to grow has no early weights, which the guide of its core needs"
        raise ConfigError(
            "E-CFG-023", "params.yaml: finetune.early_images", problem, "set pretrain.early_images"
        )
    variance = high_band_variance(run.dataset, parent.statistics)
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    denoiser = build_shell(parent.denoiser, text_dim, variance, run.shell_net()).to(run.device)
    sigma = denoiser.sigma_high_band
    top = 2 * p.sampling.lift * sigma
    draw = partial(_truncated, math.log(0.9 * sigma), s.p_std, top)

    def finish() -> dict[str, Any]:
        return run.snapshot_config("finetuned", denoiser, parent.statistics, parent)

    # All but the level below, which stays bit for bit.
    trained = nn.ModuleList(m for name, m in denoiser.named_children() if name != "below")
    low = by_band(parent.statistics, s.upscale_probability, Degrade(s.degrade.jpeg, s.degrade.blur))
    denoising_stage(run, denoiser, trained, parent.statistics, draw, top, finish, parent, low)


def by_band(statistics: Statistics, probability: float, strengths: Degrade) -> DrawLow | None:
    """How low bands get a clock of their own, in that share of images (0: not at all), and are degraded."""
    if probability == 0:
        return None

    def worse(low: Tensor, generator: torch.Generator) -> Tensor:
        return statistics.standardise(degrade(statistics.to_uint8(low), strengths, generator))

    change = worse if strengths.jpeg or strengths.blur > 0 else None

    def draw(images: Tensor, sigma: Tensor, generator: torch.Generator) -> LowBand:
        return draw_low_band(images, sigma, probability, generator, change)

    return draw


def _truncated(p_mean: float, p_std: float, top: float, batch: int, generator: torch.Generator) -> Tensor:
    return truncated_lognormal_sigma(batch, p_mean, p_std, top, generator)


def check_parent(parent: Snapshot, run: Run, resolution: int) -> None:
    """Raise ConfigError where the model to grow does not fit the parameters or the data."""
    where = f"params.yaml: {run.stage}"
    if parent.resolution != resolution:
        problem = f"the model to start from makes {parent.resolution} px, {resolution} px are needed"
        raise ConfigError("E-CFG-020", where, problem, "change data.resolution or start from another model")
    if parent.config["text_encoder"] != run.dataset.text_encoder:
        problem = "the model to start from knows another text encoder than the data"
        raise ConfigError("E-CFG-021", where, problem, "prepare the data with the model's encoder")


def refine(config: dict[str, Any]) -> None:
    """Adversarial refinement into a model of few passes; keeps the best state that the guards saw."""
    run = Run("refine", config)
    p, s = run.params, run.params.refine
    parent = load_snapshot(run.root / "models/finetuned", run.device)
    check_parent(parent, run, p.data.resolution)
    teacher = load_snapshot(run.root / "models/finetuned", run.device)
    text_dim = int(str(run.dataset.text_encoder["dim"]))
    student = parent.denoiser.requires_grad_(True).train()
    set_dtype(student, run.dtype)
    set_recompute(student, run.recompute)
    frozen: list[FrozenFeatures] = []
    if "self" in s.discriminators:
        core = levels(teacher.denoiser)[0]
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

    run.train(state, step, [check, Every(s.sample_images, s.batch_size, look)], progress)
    names = ("lr_scale", "rollbacks", "score", "best_nimg")
    metrics = dict(zip(names, state.extra["guard"][:4].tolist(), strict=True))
    with generator.using(state.extra["best"]):
        run.export(student, finish(), metrics, ["generator_loss", "discriminator_loss", "anchor"])
