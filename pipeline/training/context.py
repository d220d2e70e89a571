"""What the worker of every training stage needs, and how it exports its result.

`TrainContext` holds the stage's settings, its data, run folder and device. It runs the loop with checkpoints and
progress, draws sample grids, and commits the finished model with its reports. It knows nothing of params.yaml: the
workers (pipeline/workers) unpack that into the dataclasses used here.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.data.augment import Augment
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.diffusion.generate import Generated, generate
from pipeline.errors import StorageError
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import Lineage, SamplerSettings, SnapshotConfig
from pipeline.models.counting import count_parameters, note_gpu_memory
from pipeline.models.denoiser import Denoiser, set_dtype
from pipeline.models.finite import require_finite_metrics
from pipeline.models.kernels import mean_kernel_px, mixes
from pipeline.models.resample import rescale
from pipeline.models.shape import Images, in_order, map_images
from pipeline.models.snapshot import Snapshot, Weights, at_resolution, describe, load_snapshot, save_snapshot
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for, key
from pipeline.training.distributed import rank_and_size
from pipeline.training.faults import Faults
from pipeline.training.film import frames, sampled_captions, save_film
from pipeline.training.first_averages import first_averages
from pipeline.training.fit import Hook, Step, fit
from pipeline.training.hooks import Checkpoints, Intervals, Progress, Snapshots, failpoint
from pipeline.training.numerics import numerics, precision
from pipeline.training.records import FILM, notice, read_records
from pipeline.training.reports import COLUMNS, GRID, SAMPLES, save_grid, save_kernels, write_curves
from pipeline.training.schedule import StepSettings
from pipeline.training.state import Learner, TrainState
from pipeline.training.stop import Stops

S = TypeVar("S", bound=StepSettings)


@dataclass(frozen=True)
class ProcessSettings:
    """How one process computes.

    precision: float32, bfloat16, or auto (see `precision`). recompute: compute activations again in the backward
    pass, for less memory. compile, shard_state: see ComputeProfile. threads: CPU threads of every operation, on
    which the last bits of sums depend."""

    precision: str = "auto"
    recompute: bool = False
    compile: bool = False
    shard_state: bool = False
    threads: int = 1


@dataclass(frozen=True)
class GrowthRound:
    """A round of training: its folder (checkpoints, averages, result), the stage's clock at its start, and at the
    end of all rounds (None: of this one, the only one). A stage that trains in one round uses its run folder."""

    folder: Path
    start: int = 0
    total: int | None = None

    @property
    def result(self) -> Path:
        """The finished model and its metrics, which the next round reads."""
        return self.folder / "result"

    def finished(self) -> bool:
        """Whether the result exists and verifies; a damaged one is named, and trained again."""
        if not self.result.exists():
            return False
        try:
            artifacts.verify_directory(self.result)
        except StorageError as error:
            if rank_and_size()[0] == 0:
                text = f"{error.code} {error.where}: {error.problem}; this round of growth is finished again"
                notice(self.folder, self.start, text)
            return False
        return True


class TrainContext(Generic[S]):
    """Settings, data, run folder and device of one worker process of a training stage."""

    def __init__(
        self,
        stage: str,
        settings: S,
        intervals: Intervals,
        dataset: PreparedDataset,
        folder: Path,
        process: ProcessSettings = ProcessSettings(),
        generate: Callable[..., Generated] = generate,
    ) -> None:
        """Sets up this process: threads, deterministic algorithms, and torch's own generator, from which fresh
        networks draw their weights. `generate` draws the sample grids."""
        self.stage = stage
        self.settings = settings
        self.intervals = intervals
        self.dataset = dataset
        self.folder = folder
        self.generate = generate
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = precision(process.precision, self.device)
        self.recompute, self.shard_state = process.recompute, process.shard_state
        self.numerics = numerics(self.device, self.dtype, process.compile and self.device.type == "cuda")
        torch.set_num_threads(process.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling finds bugs, at 7% of a step. (Set by name: it is missing in torch's types.)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
        torch.manual_seed(key(settings.seed, f"{stage}-weights"))

    def of_length(self, num_images: int) -> Self:
        """The same, for a round of so many images."""
        other = copy(self)
        other.settings = replace(self.settings, num_images=num_images)
        return other

    @property
    def text_dim(self) -> int:
        """Length of a caption's vectors."""
        return int(str(self.dataset.text_encoder["dim"]))

    def batches(self, resolution: int, augment: Augment | None = None) -> Batches:
        """Training batches; images are read at `resolution` if the data set has it, else at full size."""
        s = self.settings
        return Batches(
            self.dataset, "train", s.seed, s.batch_size, s.shards, resolution, augment, s.shuffle_images
        )

    def images_and_text(self, rows: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """uint8 images and the encoded names of some rows of one bucket, on the device."""
        images = self.dataset.images(torch.tensor(rows, dtype=torch.int64).numpy())
        text = self.dataset.text([self.dataset.caption_of(row) for row in rows])
        return images.to(self.device), text.to(self.device)

    def pictures_and_text(self, rows: Sequence[int]) -> tuple[Images, Conditioning]:
        """uint8 images and the encoded names of any rows, on the device."""
        images = map_images(
            lambda alike: alike.to(self.device), self.dataset.pictures(np.array(rows, np.int64))
        )
        text = self.dataset.text([self.dataset.caption_of(row) for row in rows])
        return images, text.to(self.device)

    def parts(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Conditioning]]:
        """`images_and_text` of the rows of each bucket."""
        chosen = np.array(rows, np.int64)
        return (self.images_and_text(chosen[own].tolist()) for own in self.dataset.by_bucket(chosen))

    def pick(self, split: str, count: int) -> list[int]:
        """Up to `count` rows spread evenly over a split."""
        return self.dataset.pick(split, count)

    def train(
        self, state: TrainState, step: Step, hooks: Sequence[Hook], growth: GrowthRound | None = None
    ) -> None:
        """Run the loop from the state's nimg to the end, with checkpoints; `hooks` begin with the progress file."""
        s, growth = self.settings, growth or GrowthRound(self.folder)
        folder = growth.folder / "checkpoints"
        faults = Faults(folder, self.folder, s.batch_size, growth.start, self.samples)
        if state.nimg == 0:
            faults.origin = {name: tensor.cpu().clone() for name, tensor in state.learner_tensors().items()}

        def step_or_fail(state: TrainState) -> dict[str, Tensor]:
            failpoint("step", growth.start + state.nimg)
            return step(state)

        interval, check = self.intervals.checkpoint_images, self.dataset.check
        saver = Checkpoints(folder, interval, s.batch_size, s.num_images, faults, check, self.numerics)
        stops = Stops(self.stage, self.folder, self.intervals.log_images, growth.start, faults, saver.save)
        fit(state, step_or_fail, s.batch_size, s.num_images, [faults, *hooks, saver, stops])
        faults.settled(state)
        saver.save(state)

    def samples(self, nimg: int) -> list[str]:
        """Id and digest (sha256 of the stored pixels) of each image of the batch that begins at `nimg`."""
        batches = self.batches(self.dataset.resolution)
        rows = [int(row) for shard in range(self.settings.shards) for row in batches.places(nimg, shard)[1]]
        pixels = (self.dataset.images(np.array([row])).numpy().tobytes() for row in rows)
        digests = [sha256(each).hexdigest()[:12] for each in pixels]
        return [f"{self.dataset.rows[row]['id']} ({each})" for row, each in zip(rows, digests, strict=True)]

    def progress(self, nimg: int, growth: GrowthRound | None = None) -> Progress:
        """The progress file, cut to the images trained so far."""
        s, growth = self.settings, growth or GrowthRound(self.folder)
        path, total = self.folder / "progress.jsonl", growth.total or s.num_images
        return Progress(path, self.intervals.log_images, s.batch_size, total, nimg, growth.start)

    def snapshots(
        self,
        learners: Sequence[Learner],
        write: Callable[[Path, list[Tensor]], None],
        growth: GrowthRound | None = None,
    ) -> Snapshots:
        """The model with the first averages of `learners`, as `write(folder, averages)` writes it, in watch/ of the
        run folder, for whoever watches."""
        interval, batch_size = self.intervals.watch_images, self.settings.batch_size
        start, gather = growth.start if growth else 0, partial(first_averages, learners)
        return Snapshots(self.folder / "watch", interval, batch_size, start, gather, write)

    def snapshot_config(
        self,
        kind: str,
        denoiser: Denoiser,
        nets: Sequence[Mapping[str, Any]],
        statistics: Statistics,
        sampling: SamplerSettings,
        lineage: Lineage,
    ) -> SnapshotConfig:
        """config.json of a model of this stage. `nets`: keyword values of its networks, core first. `lineage` says
        which models it was trained from; the digests of the data are added."""
        core, shells = describe(denoiser, nets[0], nets[1:])
        return SnapshotConfig(
            kind=kind,
            core=core,
            shells=shells,
            text_encoder=self.dataset.text_encoder,
            statistics=statistics,
            sampling=sampling,
            lineage=replace(
                lineage,
                data=self.dataset.digest,
                validation=self.dataset.manifest["meta"]["validation"]["digest"],
            ),
        )

    def export(
        self,
        denoiser: Denoiser,
        config: SnapshotConfig,
        metrics: Mapping[str, float],
        curves: Mapping[str, Sequence[str]],
        early: Weights | None = None,
    ) -> None:
        """Commit result/ in the run folder: the model, its curves, metrics and sample grids. Only rank 0 writes.

        `curves` maps the suffix of each file curves{suffix}.csv to the metrics in it. A suffix such as "_64" stands
        for the level of 64 px inside the model, which gets a sample grid of its own."""
        if rank_and_size()[0]:
            return
        records = read_records(self.folder / "progress.jsonl")
        parameters = count_parameters(denoiser)
        require_finite_metrics(metrics, f"{self.stage}: metrics.json", "lower the learning rate")
        with artifacts.commit_directory(self.folder / "result", {"stage": self.stage}) as folder:
            save_snapshot(folder / "model", denoiser, config, early)
            reports = folder / "reports"
            reports.mkdir()
            for suffix, names in curves.items():
                write_curves(reports / f"curves{suffix}.csv", records, names)
            skipped = sum(record["metrics"].get("skipped_steps", 0) for record in records)
            summary = {
                "parameters": parameters,
                "num_images": self.settings.num_images,
                "skipped_steps": skipped,
            }
            summary |= metrics
            (reports / "metrics.json").write_text(
                json.dumps(summary, indent=1, sort_keys=True, allow_nan=False) + "\n"
            )
            snapshot = load_snapshot(folder / "model", self.device)
            for loaded in (snapshot.denoiser, snapshot.early):
                if loaded is not None:
                    set_dtype(loaded, self.dtype)
            for suffix in curves:
                level = at_resolution(snapshot, int(suffix[1:] or snapshot.resolution))
                self.sample_grid(level, reports / f"samples{suffix}.png")
                self.plot_kernels(level, reports / f"kernels{suffix}.png")
            self.save_film(reports / FILM, reports / "samples.png")
        note_gpu_memory(self.folder, self.device)

    def plot_kernels(self, snapshot: Snapshot, path: Path) -> None:
        """Plot the mean effective kernel against ln sigma, on held-out images; no file where kernels are off."""
        if not mixes(snapshot.denoiser):
            return
        images, text = max(self.parts(self.pick("val", GRID)), key=lambda part: len(part[0]))
        images = rescale(snapshot.statistics.standardise(images), snapshot.resolution)
        sigmas = torch.logspace(-2, 1, 13).tolist()
        noise = generator_for(self.settings.seed, "kernels", device=self.device)
        curves = mean_kernel_px(snapshot.denoiser, images, text, sigmas, noise)
        save_kernels(path, sigmas, curves)

    def log_samples(self, snapshot: Snapshot, nimg: int, settings: SamplerSettings | None = None) -> None:
        """Save a sample grid of the model as it is after `nimg` training images, and the film strip up to now."""
        self.sample_grid(snapshot, self.folder / SAMPLES / f"nimg-{nimg:012d}.png", settings)
        self.save_film(self.folder / FILM)

    def save_film(self, path: Path, finished: Path | None = None) -> None:
        """Write the film strip of what was drawn so far and, at last, of the finished model's grid."""
        save_film(path, frames(self.stage, self.folder, finished), *sampled_captions(self.dataset))

    def sample_grid(self, snapshot: Snapshot, path: Path, settings: SamplerSettings | None = None) -> None:
        """Save samples of 8 training captions (top) and 8 held-out captions (bottom), with fixed seeds."""
        rows = np.array([*self.pick("train", GRID), *self.pick("val", GRID)], np.int64)
        samples: dict[int, Tensor] = {}
        for seeds, text, shape in self.dataset.requests(rows):
            made = self.generate(snapshot, text.to(self.device), seeds, settings, shape=shape)
            samples |= zip(seeds, made.images, strict=True)
        save_grid(path, in_order(samples), columns=COLUMNS)
