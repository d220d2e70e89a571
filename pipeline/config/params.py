"""params.yaml and compute profiles as frozen, strict models.

`params.yaml` says what is computed; a profile (`infra/compute/NAME.yaml`, chosen by CRESCENDO_COMPUTE)
says where. Both are read by ruamel.yaml's safe loader, as DVC reads them (YAML 1.2: `1e-4` is a number, `no`
a string, a duplicate key an error). Unknown keys are refused, with a suggestion.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.sides import side_unit
from pipeline.config.strict_yaml import Section, parse_section, read_yaml, require
from pipeline.project import find_root

SOURCES = r"folder|archive|parquet|torchvision:[A-Za-z0-9]+|openmoji==\d+(\.\d+)*"
ENCODERS = r"minilm|label|clip:\S+"
FIXED_VERSION = r"models:/[^/@]+/\d+"  # of a registered model, as opposed to an alias
CORE_MODEL = "models/core"  # what the finetune stage grows unless another model is pinned
Count = Annotated[int, Field(ge=1, le=10**10)]  # Clocks count training images.
Size = Annotated[int, Field(ge=1, le=16384)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Quality = Annotated[int, Field(ge=1, le=100)]  # of JPEG
Probability = Annotated[float, Field(ge=0, lt=1)]
Kernels = Literal["off", "fixed", "noise", "content", "both"]
Colour = tuple[Annotated[int, Field(ge=0, le=255)], ...]
EmaStd = Annotated[float, Field(gt=0, lt=0.28)]  # Of the power-function profile; 1/sqrt(12) is its bound.


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class Split(Section):
    """Shares of the families of images that are for training, validation and test."""

    train: Positive
    val: Positive
    test: Positive


class Data(Section):
    """What the images are and how they are prepared."""

    source: str
    path: str = Field(min_length=1)
    subset: tuple[str, ...]
    resolution: Size
    fit: Literal["crop", "pad", "buckets"]
    background: Colour
    encoding: Literal["auto", "raw", "png"]
    text_encoder: str
    max_tokens: Annotated[int, Field(ge=4, le=128)]
    max_bad_fraction: Fraction
    split: Split
    captions: Literal["auto", "metadata", "sidecar", "folder", "filename", "none"] = "auto"
    link_roots: tuple[str, ...] = ()
    max_pixels: Annotated[int, Field(ge=64, le=10**9)] = 64 * 10**6
    max_bytes: Annotated[int, Field(ge=64, le=2**30)] = 64 * 2**20
    bucket_step: Annotated[int, Field(ge=0, le=16384)] = 0

    @property
    def step(self) -> int:
        """px of which the sides of buckets are multiples."""
        return self.bucket_step or max(self.resolution // 4, 1)

    @model_validator(mode="after")
    def _check(self) -> Data:
        known = re.fullmatch(SOURCES, self.source)
        choices = "folder, archive, parquet, torchvision:CIFAR10 or openmoji==17.0.0"
        require(bool(known), f"source: {self.source!r} is unknown. Fix: write {choices}")
        encoder = re.fullmatch(ENCODERS, self.text_encoder)
        choices = "minilm, label, or clip:NAME (a folder, or a name on the hub)"
        require(bool(encoder), f"text_encoder: {self.text_encoder!r} is unknown. Fix: write {choices}")
        require(len(self.background) == 3, "background: needs 3 numbers (red, green, blue)")
        require(_power_of_two(self.resolution), f"resolution: {self.resolution} is not a power of two")
        fits = self.fit != "buckets" or self.resolution % self.step == 0
        require(fits, f"bucket_step: {self.step} does not divide resolution {self.resolution}. Fix: write 0")
        apt = self.source in {"folder", "archive"} or self.captions in {"auto", "none"}
        problem = (
            f"captions: {self.captions} has no effect with source {self.source}. Fix: write auto or none"
        )
        require(apt, problem)
        total = math.fsum(self.split.model_dump().values())
        require(abs(total - 1) < 1e-6, f"split: the sum is {total:g}, must be 1")
        return self


class Core(Section):
    """Shape of the low-resolution core network."""

    resolution: Size
    patch: Literal[1, 2, 4]
    channels: Annotated[int, Field(ge=8, le=2048)]
    channel_mult: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(min_length=1)]
    num_blocks: Annotated[int, Field(ge=1, le=16)]
    attention: tuple[Size, ...]
    dropout: Probability
    kernels: Kernels

    @model_validator(mode="after")
    def _check(self) -> Core:
        require(_power_of_two(self.resolution), f"resolution: {self.resolution} is not a power of two")
        maps = [self.resolution // self.patch // 2**level for level in range(len(self.channel_mult))]
        require(maps[-1] >= 1, f"channel_mult: {len(maps)} levels are too many for {self.resolution} px")
        for size in self.attention:
            require(
                size in maps,
                f"attention: {size} is not a feature map size of this network; choose from {maps}",
            )
        effective = self.kernels == "off" or self.resolution >= 32
        require(
            effective,
            f"kernels: have no effect in a core of {self.resolution} px; they need 32 px. Fix: write off",
        )
        return self


def _as_list(value: Any) -> Any:
    """One number as a list of one, which strict models want."""
    return (value,) if isinstance(value, int | float) else value


class Shell(Section):
    """Shape of the shells, each of which doubles the resolution; one entry of `channels` each, coarse first, and of
    `patch` one for all or one each."""

    patch: Annotated[tuple[Literal[1, 2, 4], ...], Field(min_length=1), BeforeValidator(_as_list)]
    channels: Annotated[tuple[Annotated[int, Field(ge=8, le=2048)], ...], Field(min_length=1)]
    num_blocks: Annotated[int, Field(ge=1, le=16)]
    kernels: Kernels

    def nets(self) -> list[dict[str, Any]]:
        """The keyword values of each shell's network, coarse first."""
        shape = self.model_dump(mode="json", exclude={"channels", "patch"})
        patches = self.patch * len(self.channels) if len(self.patch) == 1 else self.patch
        sizes = zip(patches, self.channels, strict=True)
        return [{**shape, "patch": patch, "channels": channels} for patch, channels in sizes]


class Regions(Section):
    """Noise levels that differ by region, in the training of core and shells."""

    probability: Fraction
    maps: Literal["random", "bridge"]

    @model_validator(mode="after")
    def _check(self) -> Regions:
        effective = self.maps == "random" or self.probability > 0
        require(effective, "maps: 'bridge' has no effect without probability above 0. Fix: write random")
        return self


class Training(Section):
    """What the three training stages share. All clocks count training images."""

    num_images: Count
    batch_size: Size
    shards: Size
    threads_per_shard: Annotated[int, Field(ge=1, le=1024)] = 1
    shuffle_images: Annotated[int, Field(ge=0)] = 0
    lr: Positive
    warmup_images: Annotated[int, Field(ge=0)]
    checkpoint_images: Count
    log_images: Count
    sample_images: Count

    @model_validator(mode="after")
    def _check_clocks(self) -> Training:
        batch = self.batch_size
        require(batch % self.shards == 0, f"shards: batch_size {batch} is not divisible by {self.shards}")
        for name in ("num_images", "core_images", "checkpoint_images", "log_images", "sample_images"):
            value = getattr(self, name, 0)
            require(value % batch == 0, f"{name}: {value} is not a multiple of batch_size {batch}")
        return self


Moments = Annotated[int, Field(ge=0, le=256)]
EmaStds = Annotated[tuple[EmaStd, ...], Field(min_length=1)]


class Augment(Section):
    """How training images are augmented, and how strongly (see pipeline/data/augment.py)."""

    probability: Fraction
    mirror: bool
    scale: NonNegative
    rotate: Annotated[float, Field(ge=0, le=180)]
    shift: Fraction
    hue: Annotated[float, Field(ge=0, le=180)]


class Pretrain(Training):
    """The low-resolution core."""

    text_dropout: Probability
    p_mean: float
    p_std: Positive
    ema_std: EmaStds
    ema_snapshots: Moments
    early_images: Annotated[int, Field(ge=0)]


class Degrade(Section):
    """How images that train upscaling are degraded first (see pipeline/data/degrade.py)."""

    jpeg: tuple[Annotated[int, Field(ge=1, le=100)], ...]
    blur: Annotated[float, Field(ge=0, le=16)]

    @model_validator(mode="after")
    def _check(self) -> Degrade:
        good = not self.jpeg or (len(self.jpeg) == 2 and self.jpeg[0] <= self.jpeg[1])
        require(good, "jpeg: needs two qualities, the lower one first, or none")
        return self


class Finetune(Training):
    """Shells around a trained model. `num_images` is per growth round (see `order`)."""

    init_from: str = Field(min_length=1)
    init_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    order: Literal["one_by_one", "together"]
    core: Literal["frozen", "tuned", "joint"]
    text_dropout: Probability
    upscale_probability: Fraction
    degrade: Degrade
    p_std: Positive
    ema_std: EmaStds
    ema_snapshots: Moments
    early_images: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> Finetune:
        source, pinned = self.init_from, bool(self.init_sha256)
        fix = f"run `crescendo pin {source}`"
        fixed = not source.startswith("models:") or re.fullmatch(FIXED_VERSION, source)
        require(bool(fixed), f"init_from: {source!r} does not name a fixed version of a model. Fix: {fix}")
        own = source == CORE_MODEL
        require(
            own or pinned, f"init_sha256: is empty, {source} needs the digest of its snapshot. Fix: {fix}"
        )
        require(not (own and pinned), f"init_sha256: {CORE_MODEL} takes none. Fix: write ''")
        return self


class Refine(Training):
    """The adversarial stage: the core alone, `core_images` long, then the whole pyramid."""

    core_images: Annotated[int, Field(ge=0)]
    discriminators: Annotated[tuple[Literal["self", "lite0", "pixels"], ...], Field(min_length=1)]
    head_channels: Annotated[int, Field(ge=8, le=1024, multiple_of=8)]
    discriminator_lr: Positive
    anchor: NonNegative
    marginals: NonNegative
    noise_starts: Fraction
    penalty_weight: NonNegative
    penalty_std: Positive
    penalty_interval: Annotated[int, Field(ge=1, le=1000)]
    sigma_start: Positive
    passes: Annotated[tuple[Literal[1, 2, 4], ...], Field(min_length=1)]
    pass_probs: tuple[Fraction, ...]
    ema_halflife_images: Count
    check_images: Count
    check_samples: Annotated[int, Field(ge=2)]
    select_by: Literal["guards", "kid"]
    min_spread: Fraction
    max_caption_error: Positive

    @model_validator(mode="after")
    def _check(self) -> Refine:
        for name in ("discriminators", "passes"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{name}: an entry is given twice")
        same = len(self.pass_probs) == len(self.passes)
        require(same, f"pass_probs: needs {len(self.passes)} numbers, one for each of passes")
        total = math.fsum(self.pass_probs)
        require(abs(total - 1) < 1e-6, f"pass_probs: the sum is {total:g}, must be 1")
        check, batch = self.check_images, self.batch_size
        require(check % batch == 0, f"check_images: {check} is not a multiple of batch_size {batch}")
        return self


class Sampling(Section):
    """How the core and fine-tuned models are sampled."""

    sampler: Literal["heun", "dpmpp_2m", "sde_dpmpp_2m", "adaptive"]
    num_steps: Annotated[int, Field(ge=1, le=1000)]
    shell_steps: Annotated[int, Field(ge=1, le=1000)]
    schedule: Literal["geometric", "karras", "entropic", "rescaled"]
    guide: Literal["unconditional", "early_weights", "low_band"]
    guidance: NonNegative
    guidance_interval: tuple[NonNegative, ...]
    handover: Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_as_list)]
    early_exit: bool

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        whole = self.sampler != "adaptive" or not self.early_exit
        require(whole, "early_exit: has no effect on the adaptive sampler. Fix: write false")
        low_high = self.guidance_interval
        plain = self.sampler != "adaptive" or self.guide == "unconditional"
        require(plain, f"guide: {self.guide!r} cannot guide the adaptive sampler. Fix: write unconditional")
        good = len(low_high) == 2 and low_high[0] < low_high[1]
        require(good, "guidance_interval: needs two numbers, the lower one first")
        return self


Interval = Annotated[int, Field(ge=0, le=10**10)]  # training images; 0 = never


class WatchImages(Section):
    """How often each training stage is judged while it goes on (pipeline/watch)."""

    pretrain: Interval
    finetune: Interval
    refine: Interval


class ExtractorSetting(Section):
    """One feature extractor of the evaluation; a plain name in params.yaml stands for one without a file."""

    name: Literal["randconv", "group-cls", "lite2", "dinov2", "inception", "clip"]
    weights: str
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]

    @model_validator(mode="after")
    def _check(self) -> ExtractorSetting:
        if self.name in ("randconv", "group-cls", "lite2"):
            require(not self.weights and not self.sha256, f"weights: {self.name} takes none. Fix: write ''")
            return self
        kind = "a file" if self.name == "inception" else "a folder, or a name on the hub"
        require(bool(self.weights), f"weights: is empty, {self.name} needs {kind}. Fix: write one")
        require(bool(self.sha256), f"sha256: is empty, {self.name} needs that of its weights. Fix: write it")
        return self


class TrainingSpread(Section):
    """How much a rule's value varies with the seed of training: half width of 95%, for each of num_passes."""

    rule: str
    half_widths: tuple[NonNegative | None, ...]


class Evaluate(Section):
    """What is measured, against which model, by which extractors, on how many samples."""

    baseline: str
    baseline_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    baseline_passes: Literal[0, 1, 2, 4]
    extractors: Annotated[tuple[ExtractorSetting, ...], Field(min_length=1)]
    max_calls: Count
    num_passes: Annotated[tuple[Literal[1, 2, 4], ...], Field(min_length=1)]
    batch_size: Size
    training_spread: tuple[TrainingSpread, ...]
    watch_images: WatchImages

    @field_validator("extractors", mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        def setting(item: Any) -> Any:
            return {"name": item, "weights": "", "sha256": ""} if isinstance(item, str) else item

        return tuple(setting(item) for item in value) if isinstance(value, tuple) else value

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        names = [extractor.name for extractor in self.extractors]
        require(len(set(names)) == len(names), "extractors: an entry is given twice")
        for each in self.training_spread:
            complete = len(each.half_widths) == len(self.num_passes)
            fix = "write [], or run `python -m benchmarks.seeds --seeds 3 --write`"
            require(
                complete, f"training_spread: {each.rule} needs a number for each of num_passes. Fix: {fix}"
            )
        source, pinned = self.baseline, bool(self.baseline_sha256)
        fix = f"run `crescendo pin --baseline {source}`"
        fixed = not source or re.fullmatch(FIXED_VERSION, source)
        require(bool(fixed), f"baseline: {source!r} does not name a fixed version of a model. Fix: {fix}")
        require(
            pinned or not source,
            f"baseline_sha256: is empty, {source} needs the digest of its snapshot. Fix: {fix}",
        )
        require(not pinned or bool(source), "baseline_sha256: has no effect without baseline. Fix: write ''")
        alone = self.baseline_passes == 0 or bool(source)
        require(alone, "baseline_passes: has no effect without baseline. Fix: write 0")
        return self


class Promotion(Section):
    """When a refined model may become the champion."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    precision: Annotated[float, Field(gt=0, le=0.5)]
    margin_jpeg: Quality
    margin_noise: NonNegative
    heldout_margin_jpeg: Quality
    heldout_margin_noise: NonNegative
    recall_margin: Fraction
    coverage_margin: Fraction
    sharpness_margin: Positive
    caption_margin: Positive
    max_copy_excess: Fraction


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    data: Data
    core: Core
    shell: Shell
    regions: Regions
    augment: Augment
    pretrain: Pretrain
    finetune: Finetune
    refine: Refine
    sampling: Sampling
    evaluate: Evaluate
    promotion: Promotion

    @model_validator(mode="after")
    def _check(self) -> Params:
        top, low = self.data.resolution, self.core.resolution
        problem = f"data.resolution: {top} is not core.resolution ({low}) doubled once or more"
        require(top > low, problem)
        require(top <= 16 * low, f"data.resolution: {top} is more than 16 times core.resolution ({low})")
        octaves = (top // low).bit_length() - 1
        problem = f"needs {octaves} numbers, one for each octave from core.resolution ({low}) to"
        for key, values in (
            ("shell.patch", self.shell.patch),
            ("shell.channels", self.shell.channels),
            ("sampling.handover", self.sampling.handover),
        ):
            fits = len(values) == octaves or (key != "shell.channels" and len(values) == 1)
            require(fits, f"{key}: {problem} data.resolution ({top})")
        core = self.core.model_dump() | {"regions": self.regions.probability > 0}
        unit = side_unit(low, core, self.shell.nets())
        fits = self.data.fit != "buckets" or self.data.step % unit == 0
        fix = f"write {unit}" if unit <= top else "write data.fit: crop"
        problem = f"{self.data.step} px is not a multiple of {unit} px, which these networks need. Fix: {fix}"
        require(fits, f"data.bucket_step: {problem}")
        small = self.regions.probability > 0 and low < 8
        require(
            not small, f"regions.probability: a core of {low} px has too few regions of 4 px; it needs 8 px"
        )
        fits = self.regions.maps == "random" or self.finetune.upscale_probability == 0
        fix = "write random, or finetune.upscale_probability: 0.0"
        conflict = "cannot be combined with finetune.upscale_probability, which noises low bands separately"
        require(fits, f"regions.maps: 'bridge' {conflict}. Fix: {fix}")
        nets = self.shell.nets()
        coarse = min(low * 2**i // net["patch"] for i, net in enumerate(nets))  # positions, the coarse grid
        fits = self.shell.kernels == "off" or coarse >= 4
        require(
            fits, f"shell.kernels: a feature map of {coarse} positions is too small for them; they need 4"
        )
        for name, section in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            first, total = section.early_images, section.num_images
            require(first <= total, f"{name}.early_images: {first} is more than {name}.num_images ({total})")
        kept = bool(self.pretrain.early_images and self.finetune.early_images)
        problem = "'early_weights' needs pretrain.early_images and finetune.early_images"
        require(self.sampling.guide != "early_weights" or kept, f"sampling.guide: {problem}")
        regions = self.sampling.sampler != "adaptive" or self.regions.probability > 0
        require(regions, "sampling.sampler: 'adaptive' needs regions.probability above 0")
        degraded = bool(self.finetune.degrade.jpeg) or self.finetune.degrade.blur > 0
        effective = self.finetune.upscale_probability > 0 or not degraded
        require(effective, "finetune.degrade: has no effect without finetune.upscale_probability above 0")
        unknown = sorted(set(self.evaluate.num_passes) - set(self.refine.passes))
        require(not unknown, f"evaluate.num_passes: {unknown} is not among refine.passes")
        for name, every in self.evaluate.watch_images:
            batch = getattr(self, name).batch_size
            problem = f"{every} is less than {name}.batch_size ({batch}). Fix: raise it, or write 0"
            require(every == 0 or every >= batch, f"evaluate.watch_images.{name}: {problem}")
        return self


def load_params(path: str | os.PathLike[str] | None = None) -> Params:
    """Read and check params.yaml; by default that of the project that the working directory lies in.

    Raises:
        ConfigError: unknown key, wrong type, out of range, contradiction, not YAML.
        InputMissing: there is no such file.
    """
    file = find_root() / "params.yaml" if path is None else Path(path)
    return parse_params(read_yaml(file), source=file.name)


def parse_params(tree: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Check a tree of values, such as a parsed file or `Params.model_dump(mode="json")`."""
    return parse_section(Params, tree, source)
