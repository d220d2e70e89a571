"""Time to quality: a pyramid that is grown, beside the same one and plain networks of its cost trained otherwise.

    python -m benchmarks.ablations.growth [--seeds 0 1 2] [--rows A0 A1 ...] [--scale 1.0]
    python -m benchmarks.ablations.growth --paces       # CPU ms an image of all trainings, in turn

The study is the one in growth.yaml for the resolution of data/prepared.

Cost is CPU time of updates on one thread, the core's included: images times the paces in growth.yaml, which were
measured on a quiet machine, since other processes slow the same work down; the time that each training took is
recorded beside it. Quality is judged at the finished resolution: the weighted error of held-out images under one
noise law for all rows, and KID of samples of held-out captions. Finished work is not done again (remove
benchmarks/ablations/models and results to start over); a killed training starts over. Each process takes one
thread: give a second one other `--seeds`, or rows that share no training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablations.run import FOLDER, SHOWN, overridden, requests_for, rounded, write, yaml_of
from benchmarks.coarse import WholePyramid, at_full_resolution
from benchmarks.judging import Requests, WhitenedFeatures, caption_kid, kids, sheet_rows, whitened
from benchmarks.scale import steps_at_levels
from benchmarks.train.crescendo import RandomBatches
from benchmarks.upscale import ours, psnr, resampled, ssim
from pipeline.config.params import Finetune, Params, Pretrain, parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.data.statistics import high_band_variances, measure_statistics
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.evaluation.features import LITE2_RESOLUTIONS, lite2, randconv
from pipeline.launch.worker import WorkerConfig
from pipeline.models.config import SamplerSettings, SnapshotConfig
from pipeline.models.counting import flops
from pipeline.models.denoiser import (
    CoreDenoiser,
    Denoiser,
    ShellDenoiser,
    build_core,
    build_shell,
    mean_square,
    pyramid_levels,
    set_dtype,
)
from pipeline.models.resample import high_pass
from pipeline.models.snapshot import Snapshot, Weights, describe, load_snapshot, save_snapshot
from pipeline.prepare.framing import box_mean
from pipeline.rng import generator_for
from pipeline.training.context import GrowthRound, TrainContext
from pipeline.training.denoising import DenoisingStep
from pipeline.training.levels import SIGMA_MAX, LevelSettings, NoiseLaw, TrainedLevel, train_levels
from pipeline.training.numerics import precision
from pipeline.training.reports import save_grid
from pipeline.training.state import TrainState
from pipeline.workers.finetune import BELOW_LR
from pipeline.workers.settings import core_net, level_settings, noise_law, shell_nets, train_context

DATA = Path("data/prepared")
CORE_RESOLUTION = 32  # px
DRAWS = 2  # samples of each caption
STEPS = 32  # of the sampler, one call each
REPEATS = 16  # noise draws per image, for held-out errors
LIFT = 8.0
UPSCALE_STEPS = 8


# --- Trainings.


class Inputs(NamedTuple):
    """What networks are built from."""

    params: Params
    dataset: PreparedDataset


class Grown(NamedTuple):
    """A level to train, and its fraction of the learning rate."""

    level: Denoiser
    share: float = 1.0


Build = Callable[[Inputs], list[Grown]]
Save = Callable[[Inputs, Denoiser, int, float], None]  # (context, model, images seen, CPU seconds)


class Training(NamedTuple):
    """A recipe: a section of params.yaml with changes, the images to see, the network, and when to keep weights."""

    stage: str
    images: int
    pace: float  # CPU ms an image
    build: Build
    changes: tuple[str, ...] = ()
    moments: tuple[float, ...] = ()  # fractions of the images after which the averaged weights are kept


def core(run: Inputs) -> list[Grown]:
    """The pyramid's core."""
    return [Grown(build_core(CORE_RESOLUTION, text_dim(run), core_net(run.params)))]


def shell(run: Inputs, below: str = "core") -> list[Grown]:
    """A shell around a trained model, which is frozen, tuned or joint, by `finetune.core`."""
    trained = load(below, run.params.seed).denoiser
    grown = around(run, trained)
    if run.params.finetune.core == "frozen":
        return [Grown(grown)]
    grown.joint = run.params.finetune.core == "joint"
    return [Grown(trained, BELOW_LR), Grown(grown)]


def pyramid(run: Inputs) -> list[Grown]:
    """Core and shells, all untrained."""
    grown = core(run)
    while grown[-1].level.resolution < run.dataset.resolution:
        grown.append(Grown(around(run, grown[-1].level)))
    return grown


def around(run: Inputs, below: Denoiser) -> ShellDenoiser:
    """A fresh shell."""
    statistics, resolution = measure_statistics(run.dataset, CORE_RESOLUTION), 2 * below.resolution
    variance = high_band_variances(run.dataset, statistics, [resolution])[resolution]
    return build_shell(below, text_dim(run), variance, shell_nets(run.params)[len(pyramid_levels(below)) - 1])


def plain(run: Inputs, resolution: int | None = None) -> list[Grown]:
    """A network without shells, of the pyramid's cost at its finished resolution; for that, or a lower one."""
    return [Grown(build_core(resolution or run.dataset.resolution, text_dim(run), core_net(run.params)))]


def stretched(run: Inputs, below: str = "small", share: float = 1.0) -> list[Grown]:
    """The plain network, as it was trained on images half as large."""
    trained = load(below, run.params.seed).denoiser
    ((level, _),) = plain(run, 2 * trained.resolution)
    level.load_state_dict(trained.state_dict())
    return [Grown(level, share)]


def law(run: Inputs, level: Denoiser) -> NoiseLaw:
    """`noise_law`; for a core at the finished resolution the pyramid's law, in units of its own pixels."""
    draw, highest = noise_law(run.params, level)
    scale = level.resolution / CORE_RESOLUTION if isinstance(level, CoreDenoiser) else 1.0
    return NoiseLaw(lambda batch, generator: scale * draw(batch, generator), scale * highest)


def text_dim(run: Inputs) -> int:
    """Width of the caption embedding."""
    return int(str(run.dataset.text_encoder["dim"]))


class Study(NamedTuple):
    """A comparison at one resolution: rows pay for some trainings each, and are judged by the last of them."""

    pyramid: tuple[str, ...]  # changes to params.yaml for all trainings
    trainings: Mapping[str, Training]
    rows: Mapping[str, tuple[str, ...]]
    more: Mapping[str, Callable[[str, int, float], Mapping[str, Any]]]  # further results, by name


def study() -> Study:
    """The study for the resolution of data/prepared."""
    resolution = resolution_of(DATA.resolve())
    assert resolution in studies(), (
        f"{DATA} has {resolution} px; there is a study of {', '.join(map(str, studies()))}"
    )
    return studies()[resolution]


@cache
def resolution_of(data: Path) -> int:
    """Of a prepared data set."""
    return PreparedDataset(data).resolution


def place(folder: Path, resolution: int) -> Path:
    """Where in `folder` a study keeps things: the first one in itself, the others in folders of their own."""
    return folder if resolution == next(iter(studies())) else folder / f"{resolution}px"


@dataclass(kw_only=True)
class TimedStep(DenoisingStep):
    """Adds the CPU time of its updates to `clock`; at `moments` calls `keep` with the averaged weights in place."""

    clock: list[float]
    moments: Sequence[int]
    keep: Callable[[int], None]

    def __call__(self, state: TrainState) -> dict[str, Tensor]:
        """Do one update."""
        start = time.process_time()
        metrics = super().__call__(state)
        self.clock[0] += time.process_time() - start
        nimg = state.nimg + self.settings.batch_size
        if nimg in self.moments:
            learner = state.learners[f"net{self.suffix}"]
            with learner.using(next(iter(learner.emas.values()))):
                self.keep(nimg)
        return metrics


def folder_of(name: str, seed: int, nimg: int | None = None) -> Path:
    """Folder of a trained model, or of the same model after `nimg` images."""
    return place(FOLDER / "models", resolution_of(DATA.resolve())) / "-".join(
        ["growth", name, str(seed), *([] if nimg is None else [str(nimg)])]
    )


def load(name: str, seed: int, nimg: int | None = None) -> Snapshot:
    """A trained model, in the precision of training."""
    snapshot = load_snapshot(folder_of(name, seed, nimg))
    set_dtype(snapshot.denoiser, precision("auto", torch.device("cpu")))
    return snapshot


def moments_of(training: Training, images: int) -> list[int]:
    """Images after which weights are kept."""
    batch = yaml_of(Path("params.yaml"))[training.stage]["batch_size"]
    return [round(share * images / batch) * batch for share in training.moments]


def prepared(name: str, seed: int, images: int) -> tuple[Inputs, TrainContext[LevelSettings]]:
    """What one training builds its networks from, and the context of its stage."""
    training = study().trainings[name]
    tree = overridden(yaml_of(Path("params.yaml")), (*study().pyramid, *training.changes))
    tree["seed"] = seed
    tree[training.stage] |= {"num_images": images, "early_images": 0, "ema_snapshots": 0}
    folder = Path("runs/ablate") / folder_of(name, seed).name
    shutil.rmtree(folder, ignore_errors=True)
    params, never = parse_params(tree), 1000 * images
    config = WorkerConfig(params, Path.cwd(), folder)
    stages: dict[str, Pretrain | Finetune] = {"pretrain": params.pretrain, "finetune": params.finetune}
    section = stages[training.stage]
    context = train_context(training.stage, config, section, level_settings(config, section))
    context.intervals = replace(context.intervals, sample_images=never, checkpoint_images=never)
    return Inputs(params, context.dataset), context


def fitted(name: str, seed: int, images: int, save: Save) -> float:
    """Train one network; `save` gets what is to be kept of it. Returns CPU seconds of its updates."""
    training, clock = study().trainings[name], [0.0]
    run, context = prepared(name, seed, images)
    grown = training.build(run)
    denoiser = grown[-1].level

    def keep(nimg: int) -> None:
        save(run, denoiser, nimg, clock[0])

    def export(config: SnapshotConfig, numbers: dict[str, float], early: Weights | None) -> None:
        save(run, denoiser, images, clock[0])

    timed = partial(TimedStep, clock=clock, moments=moments_of(training, images), keep=keep)
    parts = []
    for level, share in grown:
        suffix = "" if level is denoiser else f"_{level.resolution}"
        lr = share * context.settings.lr
        parts.append(TrainedLevel(level, law(run, level), lr, suffix, make_step=timed))
    statistics = measure_statistics(run.dataset, CORE_RESOLUTION)
    build = partial(config_of, run, denoiser)
    train_levels(context, GrowthRound(context.folder), parts, statistics, build, export)
    shutil.rmtree(context.folder)
    return clock[0]


def train(name: str, seed: int, scale: float) -> None:
    """Train one network, unless it is there."""
    if (folder_of(name, seed) / "manifest.json").is_file():
        return
    training = study().trainings[name]
    images = round(scale * training.images / 16) * 16

    def save(run: Inputs, denoiser: Denoiser, nimg: int, seconds: float) -> None:
        folder = folder_of(name, seed, None if nimg == images else nimg)
        cost = {"images": nimg, "seconds": nimg * training.pace / 1000, "took": seconds}
        save_snapshot(folder, denoiser, replace(config_of(run, denoiser), extra={"cost": cost}))

    seconds = fitted(name, seed, images, save)
    print(f"{name}-{seed}: {images} images in {seconds:.1f} s", flush=True)


def paces(images: int = 640) -> None:
    """Print CPU ms an image of all trainings, measured in turn; a first round goes before."""
    for counted in (False, True):
        for name in study().trainings:
            seconds = fitted(name, 0, images, lambda *kept: None)
            if counted:
                print(f"{name}: {1000 * seconds / images:.2f} ms", flush=True)


def config_of(run: Inputs, denoiser: Denoiser) -> SnapshotConfig:
    """config.json of a model, which is sampled without guidance."""
    above = len(pyramid_levels(denoiser)) - 1
    core, shells = describe(denoiser, core_net(run.params), shell_nets(run.params)[:above])
    own = SamplerSettings(**run.params.sampling.model_dump())
    return SnapshotConfig(
        kind="finetuned" if above else "core",
        core=core,
        shells=shells,
        text_encoder=run.dataset.text_encoder,
        statistics=measure_statistics(run.dataset, CORE_RESOLUTION),
        sampling=replace(own, guidance=1.0, num_steps=STEPS),
    )


# --- Judging.


class Judges(NamedTuple):
    """Data, and features by which images are compared."""

    dataset: PreparedDataset
    params: Params
    features: list[WhitenedFeatures]

    def kid_of(self, samples: Tensor, requests: Requests) -> dict[str, float]:
        """KID of samples uint8 [N,3,R,R] against the real images of all captions."""
        captions = requests.captions
        real = self.dataset.images(captions.rows)
        return {
            f"kid_{each.name}": caption_kid(captions, each(real), each(samples), requests.which)
            for each in self.features
        }


@cache
def judges() -> Judges:
    """Fitted on the training split, at the finished resolution."""
    dataset = PreparedDataset(DATA)
    extractors = [randconv(dataset.resolution), lite2(LITE2_RESOLUTIONS[0])]
    if dataset.resolution > LITE2_RESOLUTIONS[0]:  # where that one sees smaller images
        extractors.append(replace(lite2(dataset.resolution), name="lite2_fine"))
    features = whitened(extractors, dataset.images(dataset.split("train")))
    return Judges(dataset, parse_params(yaml_of(Path("params.yaml"))), features)


@torch.no_grad()
def held_out(snapshot: Snapshot) -> dict[str, float]:
    """Mean of (sigma^2 + 0.25) / (sigma 0.5)^2 |D - x|^2 over the test split, and the high band's part of it."""
    dataset, law = judges().dataset, judges().params.pretrain
    rows = dataset.split("test")
    x = snapshot.statistics.standardise(dataset.images(rows))
    text = dataset.text([dataset.caption_of(int(row)) for row in rows])
    denoise = WholePyramid(snapshot.denoiser, snapshot.config.sampling.handover)
    totals = torch.zeros(2, dtype=torch.float64)
    for repeat in range(REPEATS):
        generator = generator_for(0, "growth-errors", repeat)
        scale = dataset.resolution / CORE_RESOLUTION  # white noise halves in 2x2 means
        sigma = scale * lognormal_sigma(len(x), law.p_mean, law.p_std, generator)
        noisy = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=generator)
        off = denoise(noisy, sigma, text) - x
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        for i, part in enumerate((off, high_pass(off))):
            totals[i] += (weight * mean_square(part, sigma)).double().mean() / REPEATS
    return {"error": float(totals[0]), "error_high": float(totals[1])}


Sample = Callable[[Snapshot, Any, Sequence[int]], Tensor]


def coarse_to_fine(snapshot: Snapshot, text: Any, seeds: Sequence[int], handover: float) -> Tensor:
    """Images uint8 [N,3,R,R] without guidance; a network without shells is sampled at full resolution."""
    highest = SIGMA_MAX * pyramid_levels(snapshot.denoiser)[0].resolution / CORE_RESOLUTION
    settings = SamplerSettings(STEPS, "sde_dpmpp_2m", handover=(handover,))
    x, _ = sample_pyramid(snapshot.denoiser, text, seeds, settings, sigma_max=highest)
    return snapshot.statistics.to_uint8(x)


def judge_samples(name: str, seed: int, snapshot: Snapshot, sample: Sample) -> dict[str, float]:
    """KID of samples of held-out captions; writes a grid of some."""
    by = judges()
    requests = requests_for(by.dataset, name, DRAWS)
    text, seeds = requests.text, requests.seeds
    samples = torch.cat([sample(snapshot, text.select(i), seeds[i]) for i in batches(len(seeds))])
    path = results() / f"{name}-{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(path, samples[sheet_rows(len(requests.captions.rows), SHOWN)], columns=SHOWN // 2)
    return by.kid_of(samples, requests)


def results() -> Path:
    """Folder of numbers and grids."""
    return place(FOLDER / "results", resolution_of(DATA.resolve()))


def batches(count: int, size: int = 62) -> Iterator[slice]:
    """Slices of at most `size`."""
    return (slice(i, i + size) for i in range(0, count, size))


def macs(denoiser: Denoiser) -> float:
    """Multiply-adds of a call for one image."""
    noisy = torch.zeros(1, 3, denoiser.resolution, denoiser.resolution)
    with torch.no_grad():
        return flops(lambda: denoiser(noisy, torch.ones(1), RandomBatches(1, 1).text)) / 2


def image_macs(denoiser: Denoiser, handover: float | None) -> float:
    """Multiply-adds of an image, coarse to fine; handover None: all steps at full resolution."""
    costs = [macs(level) for level in pyramid_levels(denoiser)]
    if handover is None or len(costs) == 1:
        return STEPS * costs[-1]
    return sum(n * cost for n, cost in zip(steps_at_levels(denoiser, STEPS), costs, strict=True))


def judged(name: str, seed: int, snapshot: Snapshot) -> dict[str, float]:
    """Both kinds of quality."""
    numbers = judge_samples(name, seed, snapshot, partial(coarse_to_fine, handover=LIFT))
    return held_out(snapshot) | numbers


def with_shells(snapshot: Snapshot, grown: Snapshot) -> Snapshot:
    """A model below untrained shells like those of `grown`: their high bands are Wiener filters."""
    built, width = snapshot.denoiser, grown.config.text_dim
    for known in grown.config.shells[len(pyramid_levels(built)) - 1 :]:
        built = build_shell(built, width, known.high_band_variance, known.net)
    return Snapshot(built.eval(), grown.config, "")


# --- Rows.


def trained(names: Sequence[str], seed: int, scale: float) -> Snapshot:
    """The model of the last of some trainings, each of which may need the ones before."""
    for name in names:
        train(name, seed, scale)
    return load(names[-1], seed)


def row_of(row: str, seed: int, scale: float) -> dict[str, Any]:
    """Train and judge one row of the study."""
    names = study().rows[row]
    snapshot = trained(names, seed, scale)
    costs = [load(name, seed).config.extra["cost"] for name in names]
    return {
        "images": [cost["images"] for cost in costs],
        "seconds": sum(cost["seconds"] for cost in costs),
        "took": sum(cost["took"] for cost in costs),
        "macs": image_macs(snapshot.denoiser, LIFT),
        **judged(row, seed, snapshot),
    }


def curve_of(curve: str, seed: int, scale: float) -> dict[str, Any]:
    """Quality by CPU time, from the weights kept during training; the end of training is not among them."""
    row = curve.removesuffix("-curve")
    names = study().rows[row]
    finished = trained(names, seed, scale)
    points, spent = [], 0.0
    for name in names:
        end = load(name, seed)
        stops = moments_of(study().trainings[name], end.config.extra["cost"]["images"])
        whole = [load(name, seed, nimg) for nimg in stops]
        if name != names[-1]:
            whole.append(end)
        for each in whole:
            seconds = spent + each.config.extra["cost"]["seconds"]
            if each.resolution < finished.resolution:
                each = with_shells(each, finished)
            points.append({"seconds": seconds, **judged(f"{row}-part", seed, each)})
        spent += end.config.extra["cost"]["seconds"]
    return {"curve": [rounded(point) for point in points]}


def sampled_otherwise(way: str, seed: int, scale: float) -> dict[str, Any]:
    """A0's model sampled in another way: `M1-full`, or `M1-` and the lift."""
    snapshot = trained(study().rows["A0"], seed, scale)
    if way == "M1-full":
        numbers = judge_samples(way, seed, snapshot, lambda *args: at_full_resolution(*args)[0])
        return {"macs": image_macs(snapshot.denoiser, None), **numbers}
    lift = float(way.removeprefix("M1-"))
    numbers = judge_samples(way, seed, snapshot, partial(coarse_to_fine, handover=lift))
    return {"macs": image_macs(snapshot.denoiser, lift), **numbers}


def upscaled(row: str, seed: int, scale: float) -> dict[str, float]:
    """Test images at twice the size, by the method after `M2-`: a filter of Pillow's, or a shell."""
    from PIL import Image

    name = row.removeprefix("M2-")
    by = judges()
    rows = by.dataset.split("test")
    real = by.dataset.images(rows).permute(0, 2, 3, 1).numpy()
    texts = [by.dataset.text([by.dataset.caption_of(int(row))]) for row in rows]
    if name in ("bicubic", "lanczos"):
        method = resampled(Image.Resampling[name.upper()])
    else:
        method = ours(trained(("core", name), seed, scale), UPSCALE_STEPS)
    enlarged = np.stack([method(box_mean(x, 2), text) for x, text in zip(real, texts, strict=True)])
    quality = {"psnr": float(np.mean(list(map(psnr, enlarged, real))))}
    quality["ssim"] = float(np.mean(list(map(ssim, enlarged, real))))
    pair = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (real, enlarged)]
    return quality | {f"kid_{name}": value for name, value in kids(by.features, *pair).items()}


BUILDERS: dict[str, Callable[..., list[Grown]]] = {
    "core": core,
    "shell": shell,
    "pyramid": pyramid,
    "plain": plain,
    "stretched": stretched,
}


@cache
def studies() -> dict[int, Study]:
    """{px: study}, of growth.yaml beside this file."""
    trees = yaml_of(Path(__file__).with_suffix(".yaml"))
    return {resolution: parse_study(tree) for resolution, tree in trees.items()}


def parse_study(tree: Mapping[str, Any]) -> Study:
    """A study from its part of growth.yaml."""
    more = dict.fromkeys(tree["curves"], curve_of)
    more |= dict.fromkeys(tree["sampled"], sampled_otherwise)
    more |= dict.fromkeys(tree.get("upscaled", ()), upscaled)
    trainings = {name: parse_training(**values) for name, values in tree["trainings"].items()}
    return Study(tuple(tree["pyramid"]), trainings, {k: tuple(v) for k, v in tree["rows"].items()}, more)


def parse_training(
    stage: str,
    images: int,
    pace: float,
    build: str,
    changes: Sequence[str] = (),
    moments: Sequence[float] = (),
    **options: Any,
) -> Training:
    """A training from its line of growth.yaml; what it does not know is an option of the network."""
    network = partial(BUILDERS[build], **options)
    return Training(stage, images, pace, network, tuple(changes), tuple(moments))


def main() -> None:
    """Train and judge the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of images, to try it out")
    parser.add_argument("--paces", action="store_true", help="measure those of all trainings instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.paces:
        paces()
        return
    make = dict.fromkeys(study().rows, row_of) | dict(study().more)
    if unknown := set(args.rows or ()) - set(make):
        parser.error(f"--rows: no {', '.join(sorted(unknown))} among {', '.join(make)}")
    for seed in args.seeds:
        for row in args.rows or make:
            path = results() / f"{row}-{seed}.json"
            if not path.is_file():
                start = time.process_time()
                result = make[row](row, seed, args.scale)
                write(str(path.relative_to(FOLDER / "results")), result)
                print(
                    f"{row}-{seed} after {time.process_time() - start:.0f} s: {json.dumps(result)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
