"""What every training stage needs: parameters, data, folders, device; and how its result is exported."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.config.params import Params, parse_params
from pipeline.data.augment import LABELS, Augment
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.diffusion.generate import Generated, generate
from pipeline.errors import ConfigError, StorageError
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import Lineage, SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import Denoiser, pyramid_levels, set_dtype
from pipeline.models.kernels import mean_kernel_px, mixes
from pipeline.models.resample import resize
from pipeline.models.snapshot import Snapshot, Weights, at_resolution, describe, load_snapshot, save_snapshot
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for, key
from pipeline.training import checkpoint
from pipeline.training.distributed import rank_and_size
from pipeline.training.fit import Hook, Step, fit
from pipeline.training.hooks import Checkpoints, Progress, failpoint, read_records
from pipeline.training.reports import GRID, save_grid, save_kernels, write_curves
from pipeline.training.state import TrainState


class TrainContext:
    """What every training stage needs: parameters, data, folders, device."""

    def __init__(
        self, stage: str, config: dict[str, Any], generate: Callable[..., Generated] = generate
    ) -> None:
        """`generate` draws the sample grids."""
        self.generate = generate
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

    def conditioning_options(self) -> dict[str, int | bool]:
        """The keyword values of a network that is told how images were augmented, and of noise by region."""
        return {
            "augment_labels": LABELS if self.augment.probability > 0 else 0,
            "regions": self.params.regions.probability > 0,
        }

    def core_net(self) -> dict[str, Any]:
        """The keyword values of the core's network."""
        return self.params.core.model_dump(mode="json", exclude={"resolution"}) | self.conditioning_options()

    def shell_nets(self) -> list[dict[str, Any]]:
        """The keyword values of each shell's network, coarse first."""
        more = {**self.conditioning_options(), "bands": self.params.finetune.upscale_probability > 0}
        return [net | more for net in self.params.shell.nets()]

    def images_and_names(self, rows: Sequence[int]) -> tuple[Tensor, Conditioning, list[str]]:
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
        self, state: TrainState, step: Step, hooks: Sequence[Hook], phase: "GrowthRound | None" = None
    ) -> None:
        """Fit from the state's nimg to the end, with checkpoints; `hooks` begin with the progress file."""
        s, phase = self.section, phase or GrowthRound(self.folder)

        def watched(state: TrainState) -> dict[str, Tensor]:
            failpoint("step", phase.start + state.nimg)
            return step(state)

        saver = Checkpoints(phase.folder / "checkpoints", s.checkpoint_images, s.batch_size)
        fit(state, watched, s.batch_size, s.num_images, [*hooks, saver])
        checkpoint.save(phase.folder / "checkpoints", state)

    def progress(self, nimg: int, phase: "GrowthRound | None" = None) -> Progress:
        """The progress file, cut to what has been trained."""
        s, phase = self.section, phase or GrowthRound(self.folder)
        path, total = self.folder / "progress.jsonl", phase.count * s.num_images
        return Progress(path, s.log_images, s.batch_size, total, nimg, phase.start)

    def snapshot_config(
        self, kind: str, denoiser: Denoiser, statistics: Statistics, parent: Snapshot | None
    ) -> SnapshotConfig:
        """config.json of the finished model."""
        core = parent.config.core.net if parent else self.core_net()
        known = [shell.net for shell in parent.config.shells] if parent else []
        nets = [*known, *self.shell_nets()[len(known) : len(pyramid_levels(denoiser)) - 1]]
        core_config, shells = describe(denoiser, core, nets)
        return SnapshotConfig(
            kind=kind,
            core=core_config,
            shells=shells,
            text_encoder=self.dataset.text_encoder,
            statistics=statistics,
            sampling=SamplerSettings(**self.params.sampling.model_dump()),
            lineage=self.lineage(kind, parent),
        )

    def lineage(self, kind: str, parent: Snapshot | None) -> Lineage:
        """Digests of data, its validation and parent; and which model was grown, known of a fine-tuned model and
        of those made of it."""
        init_from, init_sha256 = None, None
        if kind == "finetuned" and parent is not None:
            init_from, init_sha256 = self.params.finetune.init_from, parent.digest
        elif parent is not None:
            init_from, init_sha256 = parent.config.lineage.init_from, parent.config.lineage.init_sha256
        return Lineage(
            data=artifacts.directory_digest(self.dataset.path),
            validation=self.dataset.manifest["meta"]["validation"]["digest"],
            parent=parent.digest if parent else None,
            init_from=init_from,
            init_sha256=init_sha256,
        )

    def export(
        self,
        denoiser: Denoiser,
        config: SnapshotConfig,
        metrics: Mapping[str, float],
        curves: Mapping[str, Sequence[str]],
        early: Weights | None = None,
    ) -> None:
        """Commit run_dir/result: the model, its curves, numbers and sample grid. Only rank 0 writes.

        `curves` has the metrics of each file curves{suffix}.csv; a suffix such as "_64" names a level below, which
        gets a sample grid as well."""
        if rank_and_size()[0]:
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
        images = resize(snapshot.statistics.standardise(images), snapshot.resolution)
        sigmas = torch.logspace(-2, 1, 13).tolist()
        noise = generator_for(self.params.seed, "kernels", device=self.device)
        curves = mean_kernel_px(snapshot.denoiser, images, text, sigmas, noise)
        save_kernels(path, sigmas, curves)

    def sample_grid(self, snapshot: Snapshot, path: Path, settings: SamplerSettings | None = None) -> None:
        """Draw samples of 8 training captions (above) and 8 held-out ones (below), fixed seeds."""
        rows = [*self.pick("train", GRID), *self.pick("val", GRID)]
        _, text, _ = self.images_and_names(rows)
        made = self.generate(snapshot, text, range(len(rows)), settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, made.images, columns=8)


def precision(name: str, device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where the hardware computes in it (`auto`)."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


@dataclass(frozen=True)
class GrowthRound:
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


def check_parent(parent: Snapshot, run: TrainContext) -> None:
    """Raise ConfigError where a model knows other captions than the data."""
    known, given = parent.config.text_encoder, run.dataset.text_encoder
    if known != given:
        name = next(name for name in {**given, **known} if known.get(name) != given.get(name))
        problem = (
            f"the text encoder's {name} is {known.get(name)} in the model, {given.get(name)} in the data"
        )
        fix = "prepare the data with the model's encoder"
        raise ConfigError("E-CFG-021", f"params.yaml: {run.stage}", problem, fix)
