"""What training waits for: a batch beside the update that it is for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count as numbers_from
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.load import prepared
from benchmarks.data.synthetic import photo, squares
from benchmarks.measure import Run, interleave, ratio, show, table
from pipeline.config.params import Finetune, Params, Pretrain, load_params
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.statistics import measure_statistics
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.models.denoiser import Denoiser, build_core, build_shell, set_dtype
from pipeline.training.denoising import DenoisingSettings, DenoisingStep
from pipeline.training.numerics import precision

ROOT = Path(__file__).resolve().parents[2]


def wait_table(count: int, repeats: int) -> str:
    """A batch of the demo's core and shell as a share of the update that it is for (forward and backward)."""
    params = load_params(ROOT / "params.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        dataset = prepared(Path(scratch), squares(photo, count, params.data.resolution), "raw")
        updates = {name: _update(params, dataset, name) for name in ("pretrain", "finetune")}
        runs = {(name, i): update[i] for name, update in updates.items() for i in range(2)}
        times = interleave(runs, repeats)
    lines = []
    for name in updates:
        load, step = times[name, 0], times[name, 1]
        share = ratio(load, step)
        lines.append([name, *(f"{show([1000 * t for t in each])}" for each in (load, step)), f"{share:.2%}"])
    headers = ("a shard of the demo's batch", "load ms", "load and train ms", "share")
    return f"Wait for data; {torch.get_num_threads()} thread.\n\n" + table(headers, lines)


def _update(params: Params, dataset: PreparedDataset, stage: str, times: int = 8) -> tuple[Run, Run]:
    """Seconds to load a shard of a batch; seconds to load it and train on it."""
    torch.manual_seed(0)
    net = params.core.model_dump(mode="json", exclude={"resolution"})
    denoiser: Denoiser = build_core(params.core.resolution, 384, net)
    settings: Pretrain | Finetune = params.pretrain
    if stage == "finetune":
        denoiser = build_shell(denoiser, 384, 0.05, params.shell.nets()[0])
        settings = params.finetune
    set_dtype(denoiser, precision("auto", torch.device("cpu")))
    batches = Batches(dataset, "train", 0, settings.batch_size, settings.shards, denoiser.resolution)
    step = DenoisingStep(
        denoiser=denoiser,
        batches=batches,
        statistics=measure_statistics(dataset, params.core.resolution),
        draw_sigma=_sigma,
        settings=DenoisingSettings(
            seed=0,
            batch_size=settings.batch_size,
            shards=settings.shards,
            lr=settings.lr,
            warmup_images=settings.warmup_images,
            num_images=settings.num_images,
            text_dropout=settings.text_dropout,
        ),
    )
    moments = numbers_from(0, settings.batch_size)

    def load(nimg: int) -> None:
        batches.at(nimg, 0).to("cpu")

    def train(nimg: int) -> None:
        step.shard_loss(nimg, 0)[0].backward()

    def timed(work: Callable[[int], None]) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work(next(moments))
        return (time.perf_counter() - start) / times

    return partial(timed, load), partial(timed, train)


def _sigma(batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, -1.0, 1.4, generator)
