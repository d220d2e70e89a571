"""What each part of the method is worth: the core trained with and without it, sampled in several ways.

    python -m benchmarks.ablations.run train|inspect|sample ...

params.yaml beside this file names networks and rows, dvc.yaml makes a stage of each, `make ablate` runs them all.
Finished stages are not run again; a killed training continues from its checkpoint. Each stage takes one thread, so
that other stages can run on the other cores (`dvc repro` in another clone). table.py prints the results.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.judging import (
    Judges,
    Requests,
    fit_judges,
    held_out_requests,
    images_at,
    load_model,
    sheet_rows,
)
from pipeline import artifacts
from pipeline.config.params import parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.adaptive import easy_first, region_denoiser, sde_dpmpp_2m_adaptive
from pipeline.diffusion.generate import generate
from pipeline.diffusion.noise import karras_sigmas, lognormal_sigma
from pipeline.diffusion.regions import arrange, detail
from pipeline.diffusion.samplers import ADAPTIVE
from pipeline.diffusion.seeds import seeded_noise
from pipeline.launch import fingerprint
from pipeline.launch.worker import WorkerConfig
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import PATCH, CoreDenoiser, mean_square
from pipeline.models.snapshot import Snapshot
from pipeline.rng import generator_for
from pipeline.training.denoising import DenoisingStep
from pipeline.training.levels import SIGMA_MAX
from pipeline.training.reports import save_grid
from pipeline.workers.pretrain import train_core
from pipeline.workers.settings import level_settings, train_context

FOLDER = Path("benchmarks/ablations")
DRAWS = 4  # samples of each caption
REPEATS = 16  # noise draws per image, for held-out errors
SHOWN = 16  # samples of the grid


# --- Training.


class DetailMaps(DenoisingStep):
    """Maps of the usual law, sorted so that finer detail of the clean image gets more noise; they leak it."""

    def levels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Noise levels [B,1,g,g]."""
        sigma = super().levels(images, generator)
        return arrange(sigma, detail(images, sigma.shape[-2:]))


@dataclass(kw_only=True)
class IndependentMaps(DenoisingStep):
    """Maps with an independent level for each patch, from the noise law; half of the images have one level."""

    law: tuple[float, float]  # mean and standard deviation of ln sigma

    def levels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Noise levels [B,1,g,g]."""
        sigma = super().levels(images, generator)
        own = lognormal_sigma(sigma.numel(), *self.law, generator).view(sigma.shape)
        one = lognormal_sigma(len(sigma), *self.law, generator)[:, None, None, None].expand(sigma.shape)
        several = torch.rand((len(sigma), 1, 1, 1), generator=generator, device=generator.device) < 0.5
        return torch.where(several, own, one).clamp(0.002, SIGMA_MAX)


def overridden(tree: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """`tree` with `section.key=value` set, values as in YAML."""
    from ruamel.yaml import YAML

    for change in changes:
        path, _, value = change.partition("=")
        section, _, name = path.partition(".")
        assert name in tree[section], f"params.yaml has no {path}"
        tree[section][name] = YAML(typ="safe").load(value)
    return tree


def train(name: str, seed: int, images: int, changes: Sequence[str], maps: str | None) -> None:
    """Train one network; continue or export where a run before left off."""
    from ruamel.yaml import YAML

    root = Path.cwd()
    tree = overridden(YAML(typ="safe").load(Path("params.yaml").read_text()), changes)
    dropout = tree["pretrain"]["text_dropout"]
    tree["pretrain"]["text_dropout"] = min(dropout, 0.5)  # params.yaml refuses 1, which only this table uses
    tree["seed"] = seed
    tree["pretrain"] |= {"num_images": images, "sample_images": images, "log_images": 320}
    params = parse_params(tree)
    stage = yaml_of(FOLDER / "dvc.yaml")["stages"]["train"]
    compared = {path: fingerprint.digest_path(root / FOLDER / path) for path in stage["deps"]}
    digest = artifacts.digest({"deps": compared, "params": params.model_dump(mode="json"), "maps": maps})
    folder = root / "runs" / "ablate" / f"{name}-{seed}" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "result/model/manifest.json").is_file():
        config = WorkerConfig(params, root, folder)
        settings = replace(level_settings(config, params.pretrain), text_dropout=dropout)
        run = train_context("pretrain", config, params.pretrain, settings)
        steps: dict[str | None, Callable[..., DenoisingStep]] = {
            None: DenoisingStep,
            "detail": DetailMaps,
            "independent": partial(IndependentMaps, law=(params.pretrain.p_mean, params.pretrain.p_std)),
        }
        train_core(run, params, steps[maps])
    shutil.copytree(folder / "result/model", FOLDER / "models" / f"{name}-{seed}", dirs_exist_ok=True)


def yaml_of(path: Path) -> Any:
    """A YAML file."""
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


# --- Inspecting a network.


def held_out(dataset: PreparedDataset, snapshot: Snapshot) -> tuple[Tensor, Conditioning, Tensor]:
    """The test split: standardised images at the core's resolution, encoded names, uint8 images."""
    rows = dataset.split("test")
    grey = images_at(dataset, rows, dataset.low_resolution)
    text = dataset.text([dataset.caption_of(int(row)) for row in rows])
    return snapshot.statistics.standardise(grey), text, grey


@torch.no_grad()
def inspect(name: str, seed: int) -> None:
    """Write held-out errors, of all images and by thirds of their detail, and how well patches are ranked."""
    dataset, snapshot, core = load(name, seed)
    device = next(core.parameters()).device
    images, text, _ = held_out(dataset, snapshot)
    law = parse_params(yaml_of(Path("params.yaml"))).pretrain
    if name == "no_text":
        text = text.drop_captions()
    x, text = images.to(device), text.to(device)
    errors = torch.zeros(len(x), dtype=torch.float64)
    ranked: list[float] = []
    for repeat in range(REPEATS):
        generator = generator_for(0, "ablate-errors", repeat)
        sigma = lognormal_sigma(len(x), law.p_mean, law.p_std, generator).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        errors += core.error(x, x + sigma[:, None, None, None] * noise, sigma, text).double().cpu() / REPEATS
        ranked += agreement(core, x, noise, text, (0.2, 0.5, 1.0)[repeat % 3])
    thirds = detail(images, (8, 8)).mean(dim=(1, 2, 3)).argsort().tensor_split(3)
    numbers = {"error": float(errors.mean())}
    numbers |= {
        name: float(errors[i].mean()) for name, i in zip(("plain", "medium", "fine"), thirds, strict=True)
    }
    if ranked:
        numbers["spearman"] = float(np.mean(ranked))
    write(f"{name}-{seed}.json", {"images": len(x), **numbers})


def agreement(core: CoreDenoiser, x: Tensor, noise: Tensor, text: Conditioning, sigma: float) -> list[float]:
    """Spearman's correlation of predicted and true error over the patches of each image; none without the head."""
    if core.difficulty is None:
        return []
    grid = core.resolution // PATCH
    level = torch.full((len(x), 1, grid, grid), sigma, device=x.device)
    estimate = core.estimate(x + sigma * noise, level, text)
    predicted = core.difficulty(estimate.features, core.logvar(level)).flatten(1)
    true = mean_square(estimate.denoised - x, level).flatten(1)
    pairs = zip(predicted.cpu().numpy(), true.cpu().numpy(), strict=True)
    return [float(stats.spearmanr(a, b).statistic) for a, b in pairs if a.std() > 0 and b.std() > 0]


def load(name: str, seed: int) -> tuple[PreparedDataset, Snapshot, CoreDenoiser]:
    """The data, a trained network on this machine's device, and its denoiser."""
    torch.set_num_threads(1)
    snapshot = load_model(FOLDER / "models" / f"{name}-{seed}")
    core = snapshot.denoiser
    assert isinstance(core, CoreDenoiser)
    return PreparedDataset(Path("data/prepared")), snapshot, core


def write(name: str, numbers: Mapping[str, Any]) -> None:
    """One file below the folder of results; six digits, no times."""
    path = FOLDER / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_atomic(path, json.dumps(rounded(numbers), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Floats with six significant digits, at any depth."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- Sampling.


class Way(NamedTuple):
    """How a network is sampled: one row of the table."""

    sampler: str
    guidance: float = 1.0
    guide: str = "unconditional"
    interval: str | None = None  # "everywhere": guidance at all noise levels
    order: str | None = None  # of patches, for the adaptive sampler; None: by predicted difficulty


@torch.no_grad()
def draw_samples(
    snapshot: Snapshot, text: Conditioning, seeds: Sequence[int], steps: int, way: Way
) -> tuple[Tensor, int]:
    """Images uint8 [N,3,R,R], one per seed, and calls of the denoiser for each."""
    if way.order is None:
        batch_size = 64 if next(snapshot.denoiser.parameters()).device.type == "cpu" else 512
        settings = replace(
            snapshot.config.sampling,
            num_steps=steps,
            sampler=way.sampler,
            guide=way.guide,
            guidance=way.guidance,
        )
        if way.interval == "everywhere":
            settings = replace(settings, guidance_interval=(0.0, math.inf))
        generated = generate(snapshot, text, seeds, settings, batch_size)
        return generated.images, generated.nfe
    assert way.sampler == ADAPTIVE and way.guidance == 1
    core, parts = snapshot.denoiser, []
    device = next(core.parameters()).device
    for i in range(0, len(seeds), 64):
        part = text.select(slice(i, i + 64)).to(device)
        draw = seeded_noise(seeds[i : i + 64], device)
        estimate, lead = region_denoiser(core, part), easy_first
        if way.order == "random":
            shuffled = draw("order", core.resolution // PATCH)[:, :1]
            lead = partial(constant, easy_first(shuffled))
        else:
            estimate = partial(by_detail, estimate)
        sigmas = karras_sigmas(steps, SIGMA_MAX, 0.002)
        x = draw("noise", core.resolution) * SIGMA_MAX
        noise = partial(step_noise, draw, core.resolution)
        x = sde_dpmpp_2m_adaptive(estimate, x, sigmas, noise, PATCH, lead=lead)
        parts.append(snapshot.statistics.to_uint8(x).cpu())
    return torch.cat(parts), steps


def constant(value: Tensor, _: Tensor) -> Tensor:
    """`value`, whatever the difficulty."""
    return value


def by_detail(
    estimate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], z: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The estimate, and its own detail in place of its difficulty."""
    denoised, difficulty = estimate(z, sigma)
    return denoised, detail(denoised, difficulty.shape[-2:])


def step_noise(draw: Callable[[str, int], Tensor], resolution: int, i: int) -> Tensor:
    """Noise of step i."""
    return draw(f"step-{resolution}-{i}", resolution)


def requests_for(dataset: PreparedDataset, network: str, draws: int = DRAWS) -> Requests:
    """The same for all rows; the network without captions gets none."""
    requests = held_out_requests(dataset, draws)
    if network != "no_text":
        return requests
    return requests._replace(text=requests.text.drop_captions())


def judge(
    name: str, seed: int, judges: Judges, requests: Requests, samples: Mapping[int, tuple[Tensor, int]]
) -> None:
    """Write numbers of the samples of one row, {steps: (images, calls)}, and a grid of some."""
    captions, runs = len(requests.captions.rows), []
    for steps, (images, nfe) in samples.items():
        runs.append({"steps": steps, "nfe": nfe, **judges.measure(images, requests)})
        print(name, seed, runs[-1], flush=True)
    numbers = {
        "pictures": len(requests.which),
        "captions": captions,
        "runs": [rounded(each) for each in runs],
    }
    write(f"{name}-{seed}.json", numbers)
    path = FOLDER / "results" / f"{name}-{seed}.png"
    save_grid(path, images[sheet_rows(captions, SHOWN)], columns=SHOWN // 2)


def sample(name: str, network: str, seed: int, steps: Sequence[int], way: Way) -> None:
    """Sample one network on held-out captions, and judge the samples."""
    dataset, snapshot, core = load(network, seed)
    judges, requests = fit_judges(dataset, core.resolution), requests_for(dataset, network)
    samples = {count: draw_samples(snapshot, requests.text, requests.seeds, count, way) for count in steps}
    judge(name, seed, judges, requests, samples)


# --- Stages.


def main() -> None:
    """One stage of benchmarks/ablations/dvc.yaml, or the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("train")
    one.add_argument("--name", required=True)
    one.add_argument("--images", type=int, required=True)
    one.add_argument("--set", nargs="+", default=[], dest="changes")
    one.add_argument("--maps", choices=["detail", "independent"])
    one.set_defaults(run=lambda a: train(a.name, a.seed, a.images, a.changes, a.maps))

    one = commands.add_parser("inspect")
    one.add_argument("--name", required=True)
    one.set_defaults(run=lambda a: inspect(a.name, a.seed))

    one = commands.add_parser("sample")
    one.add_argument("--name", required=True)
    one.add_argument("--network", required=True)
    one.add_argument("--steps", type=int, nargs="+", required=True)
    one.add_argument("--sampler", required=True)
    one.add_argument("--guidance", type=float, default=1.0)
    one.add_argument("--guide", default="unconditional")
    one.add_argument("--interval", choices=["everywhere"])
    one.add_argument("--order", choices=["random", "detail"])
    one.set_defaults(
        run=lambda a: sample(
            a.name, a.network, a.seed, a.steps, Way(a.sampler, a.guidance, a.guide, a.interval, a.order)
        )
    )
    for each in commands.choices.values():
        each.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
