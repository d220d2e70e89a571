"""Our side: the CPU seconds that training the demo takes on one thread, and samples of its models."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.judging import load_model
from pipeline.adversarial.few_step import generate_images
from pipeline.adversarial.step import AdversarialSettings
from pipeline.config.params import Params
from pipeline.diffusion.generate import Generated
from pipeline.launch.worker import WorkerConfig
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import pyramid_levels, set_dtype
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.training.levels import TrainedLevel, ema_decays
from pipeline.training.state import Learner, TrainState
from pipeline.workers import refine
from pipeline.workers.settings import level_settings, noise_law, train_context, unpack

REFINEMENT = "refinement"

Step = Callable[[TrainState], Mapping[str, Tensor]]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def per_image(step: Step, state: TrainState, batch_size: int, seconds: float) -> float:
    """CPU seconds an image of the real update, over about `seconds` after one update that does not count."""
    step(state)
    start, images = time.process_time(), 0
    while time.process_time() - start < seconds:
        state.nimg += batch_size
        step(state)
        images += batch_size
    return (time.process_time() - start) / images


def level_cost(config: WorkerConfig, number: int, seconds: float) -> float:
    """CPU seconds an image of training level `number` of models/finetuned: the core, or one of its shells."""
    p = config.params
    stage, section = ("finetune", p.finetune) if number else ("pretrain", p.pretrain)
    run = train_context(stage, config, section, level_settings(config, section))
    snapshot = load_snapshot(config.root / refine.PARENT)
    set_dtype(snapshot.denoiser, run.dtype)
    denoiser = pyramid_levels(snapshot.denoiser)[number]
    level = TrainedLevel(denoiser, noise_law(p, denoiser), section.lr)
    learner = Learner(level.own().requires_grad_(True), (0.9, 0.99), ema_decays(section.ema_std))
    step = level.step(run, snapshot.statistics)
    return per_image(step, TrainState({"net": learner}), section.batch_size, seconds)


def refinement_cost(config: WorkerConfig, seconds: float) -> float:
    """CPU seconds of refinement, from `seconds` of the update of each round and one check of its guards, which
    choose the state."""
    s = config.params.refine
    settings = unpack(AdversarialSettings, s, seed=config.params.seed)
    run = train_context("refine", config, s, settings)
    parent = load_snapshot(config.root / refine.PARENT)
    refining, total = refine.Refining(run, config, parent), 0.0
    levels = {level.resolution: level for level in pyramid_levels(parent.denoiser)}
    for resolution, num_images in refine.refining_rounds(config.params).items():
        begun = refining.begin(levels[resolution])
        update = per_image(begun.step, begun.state, s.batch_size, seconds)
        check = cpu_seconds(partial(begun.guards, begun.state))
        total += update * num_images + check * (1 + num_images // s.check_images)
    return total


def training_seconds(params: Params, root: Path, seconds: float = 10.0) -> dict[str, float]:
    """CPU seconds of one thread that each part of the demo's training takes, extrapolated from `seconds` of each.

    Averages, logs and sample grids between updates are not counted; the guards of refinement are."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = WorkerConfig(params=params, root=root, run_dir=Path(folder))
        numbers = range(1 + len(params.shell.nets()))
        parts = {f"level {n}": level_cost(config, n, seconds) for n in numbers}
        refinement = refinement_cost(config, 2 * seconds)
    images = dict.fromkeys(parts, params.finetune.num_images) | {"level 0": params.pretrain.num_images}
    total = {name: cost * images[name] for name, cost in parts.items()}
    return total | {REFINEMENT: refinement}


class Way(NamedTuple):
    """One way to sample one of our models."""

    name: str
    snapshot: Snapshot
    passes: int | None  # of a refined model

    @property
    def sampler(self) -> str:
        """What the table says of it."""
        if self.passes is None:
            return self.snapshot.config.sampling.sampler
        return "1 pass" if self.passes == 1 else f"{self.passes} passes"

    def sample(self, text: Conditioning, seeds: Sequence[int]) -> Generated:
        """Images and calls."""
        return generate_images(self.snapshot, text, seeds, passes=self.passes)

    def sample_once(self, text: Conditioning, seeds: Sequence[int], folder: Path) -> Generated:
        """`sample`, or what it gave before, which is kept in `folder`."""
        path = folder / f"{self.snapshot.digest[:12]}-{self.passes or 'own'}-{len(seeds)}.npz"
        if path.is_file():
            kept = np.load(path)
            return Generated(torch.from_numpy(kept["images"]), int(kept["nfe"]))
        drawn = self.sample(text, seeds)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=drawn.images.numpy(), nfe=drawn.nfe)
        return drawn


def ways(root: Path) -> list[Way]:
    """The fine-tuned model by its own settings, and the refined one in each number of passes."""
    finetuned, refined = (load_model(root / "models" / name) for name in ("finetuned", "refined"))
    return [
        Way("crescendo, fine-tuned", finetuned, None),
        *(Way("crescendo, refined", refined, passes) for passes in refined.config.passes),
    ]
