"""params.yaml and compute profiles as frozen, strict models.

`params.yaml` says what is computed; a profile (`infra/compute/NAME.yaml`, chosen by CRESCENDO_COMPUTE)
says where. Both are read by ruamel.yaml's safe loader, as DVC reads them (YAML 1.2: `1e-4` is a number,
`no` is a word, a key given twice is an error). Whatever is not known is refused, with a suggestion.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing

SOURCES = r"folder|archive|parquet|torchvision:[A-Za-z0-9]+|openmoji==\d+(\.\d+)*"
ENCODERS = r"minilm|label|clip:\S+"
PROFILE_VARIABLE = "CRESCENDO_COMPUTE"
CORE_MODEL = "models/core"  # which the finetune stage grows, unless another model is pinned
_MAX_BYTES = 64 * 1024
_MAX_NODES = 10_000

Count = Annotated[int, Field(ge=1, le=10**10)]  # Clocks are in training images.
Size = Annotated[int, Field(ge=1, le=16384)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Kernels = Literal["off", "fixed", "noise", "content", "both"]
Colour = tuple[Annotated[int, Field(ge=0, le=255)], ...]
EmaStd = Annotated[float, Field(gt=0, lt=0.28)]  # Of the power-function profile; 1/sqrt(12) is its bound.


class Section(BaseModel):
    """Base of all sections: frozen, strict (no text for numbers), finite, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class Data(Section):
    """What the images are and how they are prepared."""

    source: str
    path: str = Field(min_length=1)
    subset: tuple[str, ...]
    resolution: Size
    fit: Literal["crop", "pad"]
    background: Colour
    encoding: Literal["auto", "raw", "png"]
    text_encoder: str
    max_tokens: Annotated[int, Field(ge=4, le=128)]
    max_bad_fraction: Fraction

    @model_validator(mode="after")
    def _check(self) -> Data:
        known = re.fullmatch(SOURCES, self.source)
        choices = "folder, archive, parquet, torchvision:CIFAR10 or openmoji==17.0.0"
        _require(bool(known), f"source: {self.source!r} is unknown. Fix: write {choices}")
        encoder = re.fullmatch(ENCODERS, self.text_encoder)
        choices = "minilm, label, or clip:NAME (a folder, or a name on the hub)"
        _require(bool(encoder), f"text_encoder: {self.text_encoder!r} is unknown. Fix: write {choices}")
        _require(len(self.background) == 3, "background: needs 3 numbers (red, green, blue)")
        _require(_power_of_two(self.resolution), f"resolution: {self.resolution} is not a power of two")
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
        _require(_power_of_two(self.resolution), f"resolution: {self.resolution} is not a power of two")
        maps = [self.resolution // self.patch // 2**level for level in range(len(self.channel_mult))]
        _require(maps[-1] >= 1, f"channel_mult: {len(maps)} levels are too many for {self.resolution} px")
        for size in self.attention:
            _require(size in maps, f"attention: {size} is no feature map of this network, which has {maps}")
        effective = self.kernels == "off" or self.resolution >= 32
        _require(
            effective,
            f"kernels: have no effect in a core of {self.resolution} px; it needs 32. Fix: write off",
        )
        return self


class Shell(Section):
    """Shape of the shells, each of which doubles the resolution; `channels` of each, coarse first."""

    patch: Literal[1, 2, 4]
    channels: Annotated[tuple[Annotated[int, Field(ge=8, le=2048)], ...], Field(min_length=1)]
    num_blocks: Annotated[int, Field(ge=1, le=16)]
    kernels: Kernels

    def nets(self) -> list[dict[str, Any]]:
        """The keyword values of each shell's network, coarse first."""
        shape = self.model_dump(mode="json", exclude={"channels"})
        return [{**shape, "channels": channels} for channels in self.channels]


class Regions(Section):
    """Noise levels that differ by region, in the training of core and shell."""

    probability: Fraction
    maps: Literal["random", "bridge"]

    @model_validator(mode="after")
    def _check(self) -> Regions:
        effective = self.maps == "random" or self.probability > 0
        _require(effective, "maps: 'bridge' has no effect without probability above 0. Fix: write random")
        return self


class Training(Section):
    """What the three training stages share. All clocks count training images."""

    num_images: Count
    batch_size: Size
    shards: Size
    lr: Positive
    warmup_images: Annotated[int, Field(ge=0)]
    checkpoint_images: Count
    log_images: Count
    sample_images: Count

    @model_validator(mode="after")
    def _check_clocks(self) -> Training:
        batch = self.batch_size
        _require(batch % self.shards == 0, f"shards: batch_size {batch} is not divisible by {self.shards}")
        for name in ("num_images", "checkpoint_images", "log_images", "sample_images"):
            value = getattr(self, name)
            _require(value % batch == 0, f"{name}: {value} is not a multiple of batch_size {batch}")
        return self


Moments = Annotated[int, Field(ge=0, le=256)]
EmaStds = Annotated[tuple[EmaStd, ...], Field(min_length=1)]


class Augment(Section):
    """How training images are varied, at which strength (see pipeline/data/augment.py)."""

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
    ema_moments: Moments
    early_images: Annotated[int, Field(ge=0)]


class Degrade(Section):
    """What pictures that are trained to be upscaled went through (see pipeline/data/degrade.py)."""

    jpeg: tuple[Annotated[int, Field(ge=1, le=100)], ...]
    blur: Annotated[float, Field(ge=0, le=16)]

    @model_validator(mode="after")
    def _check(self) -> Degrade:
        good = not self.jpeg or (len(self.jpeg) == 2 and self.jpeg[0] <= self.jpeg[1])
        _require(good, "jpeg: needs two qualities, the lower one first, or none")
        return self


class Finetune(Training):
    """Shells around a trained model. `num_images` is that of each phase (`order`)."""

    init_from: str = Field(min_length=1)
    init_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    order: Literal["one_by_one", "together"]
    core: Literal["frozen", "tuned", "joint"]
    text_dropout: Probability
    upscale_probability: Fraction
    degrade: Degrade
    p_std: Positive
    ema_std: EmaStds
    ema_moments: Moments
    early_images: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> Finetune:
        source, pinned = self.init_from, bool(self.init_sha256)
        cure = f"run `crescendo pin {source}`"
        fixed = not source.startswith("models:") or re.fullmatch(r"models:/[^/@]+/\d+", source)
        _require(bool(fixed), f"init_from: {source!r} is no fixed version of a model. Fix: {cure}")
        own = source == CORE_MODEL
        _require(
            own or pinned, f"init_sha256: is empty, {source} needs the digest of its snapshot. Fix: {cure}"
        )
        _require(not (own and pinned), f"init_sha256: {CORE_MODEL} has none here. Fix: write ''")
        return self


class Refine(Training):
    """The adversarial stage."""

    discriminators: Annotated[tuple[Literal["self", "lite0"], ...], Field(min_length=1)]
    discriminator_lr: Positive
    anchor: NonNegative
    penalty_weight: NonNegative
    penalty_std: Positive
    penalty_interval: Annotated[int, Field(ge=1, le=1000)]
    sigma_start: Positive
    passes: Annotated[tuple[Literal[1, 2, 4], ...], Field(min_length=1)]
    pass_probs: tuple[Fraction, ...]
    ema_halflife_images: Count
    check_images: Count
    check_samples: Annotated[int, Field(ge=2)]
    min_spread: Fraction
    max_caption_error: Positive

    @model_validator(mode="after")
    def _check(self) -> Refine:
        for name in ("discriminators", "passes"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), f"{name}: an entry is given twice")
        same = len(self.pass_probs) == len(self.passes)
        _require(same, f"pass_probs: needs {len(self.passes)} numbers, one for each of passes")
        total = math.fsum(self.pass_probs)
        _require(abs(total - 1) < 1e-6, f"pass_probs: the sum is {total:g}, must be 1")
        check, batch = self.check_images, self.batch_size
        _require(check % batch == 0, f"check_images: {check} is not a multiple of batch_size {batch}")
        return self


def _as_list(value: Any) -> Any:
    """One number as a list of one, which strict models want."""
    return (value,) if isinstance(value, int | float) else value


class Sampling(Section):
    """How the core and fine-tuned models are sampled."""

    sampler: Literal["heun", "dpmpp_2m", "sde_dpmpp_2m", "adaptive"]
    num_steps: Annotated[int, Field(ge=1, le=1000)]
    guide: Literal["no_text", "early", "low"]
    guidance: NonNegative
    guidance_interval: tuple[NonNegative, ...]
    lift: Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_as_list)]
    finish: bool

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        whole = self.sampler != "adaptive" or not self.finish
        _require(whole, "finish: has no effect on the adaptive sampler. Fix: write false")
        low_high = self.guidance_interval
        plain = self.sampler != "adaptive" or self.guide == "no_text"
        _require(plain, f"guide: {self.guide!r} cannot guide the adaptive sampler. Fix: write no_text")
        good = len(low_high) == 2 and low_high[0] < low_high[1]
        _require(good, "guidance_interval: needs two numbers, the lower one first")
        return self


class Evaluate(Section):
    """What is measured, on how many samples."""

    heldout_captions: Annotated[int, Field(ge=1, le=1_000_000)]
    samples_per_caption: Annotated[int, Field(ge=1, le=10_000)]
    teacher_samples_per_caption: Annotated[int, Field(ge=1, le=10_000)]
    train_captions: Annotated[int, Field(ge=0, le=1_000_000)]
    teacher_train_captions: Annotated[int, Field(ge=1, le=1_000_000)]
    num_passes: Annotated[tuple[Literal[1, 2, 4], ...], Field(min_length=1)]
    batch_size: Size


class Promotion(Section):
    """When a refined model may become the champion."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    kid_margin: NonNegative
    max_copies: Fraction
    min_recall: NonNegative
    min_coverage: NonNegative


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
        _require(top > low, problem)
        _require(top <= 16 * low, f"data.resolution: {top} is more than 16 times core.resolution ({low})")
        octaves = (top // low).bit_length() - 1
        problem = f"needs {octaves} numbers, one for each octave from core.resolution ({low}) to"
        for key, values in (("shell.channels", self.shell.channels), ("sampling.lift", self.sampling.lift)):
            fits = len(values) == octaves or (key == "sampling.lift" and len(values) == 1)
            _require(fits, f"{key}: {problem} data.resolution ({top})")
        small = self.regions.probability > 0 and low < 8
        _require(
            not small, f"regions.probability: a core of {low} px has too few patches of 4 px; it needs 8 px"
        )
        fits = self.regions.maps == "random" or self.finetune.upscale_probability == 0
        cure = "write random, or finetune.upscale_probability: 0.0"
        _require(fits, f"regions.maps: 'bridge' needs low bands without a clock of their own. Fix: {cure}")
        coarse = low // self.shell.patch  # positions of the first shell's coarse feature map
        fits = self.shell.kernels == "off" or coarse >= 4
        _require(
            fits, f"shell.kernels: a feature map of {coarse} positions has no room for them; they need 4"
        )
        for name, section in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            kept, seen = section.early_images, section.num_images
            _require(kept <= seen, f"{name}.early_images: {kept} is more than {name}.num_images ({seen})")
        early = self.sampling.guide != "early" or (self.pretrain.early_images and self.finetune.early_images)
        _require(bool(early), "sampling.guide: 'early' needs pretrain.early_images and finetune.early_images")
        regions = self.sampling.sampler != "adaptive" or self.regions.probability > 0
        _require(regions, "sampling.sampler: 'adaptive' needs regions.probability above 0")
        degraded = bool(self.finetune.degrade.jpeg) or self.finetune.degrade.blur > 0
        effective = self.finetune.upscale_probability > 0 or not degraded
        _require(effective, "finetune.degrade: has no effect without finetune.upscale_probability above 0")
        foreign = sorted(set(self.evaluate.num_passes) - set(self.refine.passes))
        _require(not foreign, f"evaluate.num_passes: {foreign} is not among refine.passes")
        return self


class ComputeProfile(Section):
    """Where a stage runs. Nothing here changes a result's meaning, and nothing here makes a stage stale.

    workers: processes of a training stage; 0 trains in the calling process.
    threads: CPU threads a worker; 0 divides the machine's cores by the workers.
    max_failures: restarts from the last checkpoint before a stage gives up; -1 is without end.
    address: dashboard URL of a Ray cluster (jobs API); null runs here.
    storage: absolute folder that all nodes share; null is the working tree.
    recompute: compute activations again in the backward pass, for less memory; about a third more time.
    cuda_graphs: on a GPU, record the passes of a training step once and replay them; not with recompute.
    compile: on a GPU, torch.compile the denoising losses: a minute or two a level, then 1.5 times as fast.
    """

    workers: Annotated[int, Field(ge=0, le=4096)] = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=-1)] = 3
    address: str | None = None
    storage: str | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False
    cuda_graphs: bool = True
    compile: bool = False

    @model_validator(mode="after")
    def _check(self) -> ComputeProfile:
        absolute = self.storage is None or Path(self.storage).is_absolute()
        _require(absolute, f"storage: {self.storage!r} is not an absolute path")
        needs = self.address is None or self.storage is not None
        _require(needs, "storage: a cluster (address) needs a folder that its nodes share")
        return self


# --- Presets.


def presets(root: Path) -> dict[str, str]:
    """{name: the first line of its comment} of the files in presets/."""
    found = {}
    for path in sorted((root / "presets").glob("*.yaml")):
        found[path.stem] = path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
    return found


def apply_preset(root: Path, name: str) -> list[str]:
    """Write the values of presets/NAME.yaml into params.yaml, comments kept; one line a value that changed.

    Raises ConfigError where there is no such preset, or the result would not be valid (nothing is written then).
    """
    known = presets(root)
    if name not in known:
        fix = f"choose one of: {', '.join(known) or 'none'}"
        raise ConfigError("E-CFG-017", "presets", f"there is no preset {name!r}", fix)
    changes = _read_yaml(root / "presets" / f"{name}.yaml")
    return change_params(root, changes, f"params.yaml with presets/{name}.yaml")


def change_params(root: Path, changes: Mapping[str, Any], what: str) -> list[str]:
    """Write values into params.yaml, comments kept; one line a value that changed.

    Raises ConfigError, which names `what`, where the result would not be valid (nothing is written then)."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096  # No line is folded.
    yaml.indent(mapping=2, sequence=4, offset=2)
    params = yaml.load((root / "params.yaml").read_text(encoding="utf-8"))
    lines = list(_merge(params, changes, ""))
    text = io.StringIO()
    yaml.dump(params, text)
    parse_params(YAML(typ="safe").load(text.getvalue()), what)
    artifacts.write_atomic(root / "params.yaml", text.getvalue())
    return lines


def _merge(into: Any, changes: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Set the leaves of `changes`, at any depth; yields `section.key: old -> new`."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), Mapping):
            yield from _merge(into[key], value, f"{prefix}{key}.")
        elif into.get(key) != value:
            yield f"{prefix}{key}: {_plain(into.get(key))} -> {_plain(value)}"
            into[key] = value


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, list) else str(value)


# --- Reading.

_Model = TypeVar("_Model", bound=Section)


def load_params(path: str | os.PathLike[str] = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: unknown key, wrong type, out of range, contradiction, not YAML.
        InputMissing: there is no such file.
    """
    return parse_params(_read_yaml(Path(path)), source=Path(path).name)


def parse_params(tree: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Check a tree of values, such as a parsed file or `Params.model_dump(mode="json")`."""
    return _parse(Params, tree, source)


def load_profile(root: str | os.PathLike[str] = ".", name: str | None = None) -> ComputeProfile:
    """Read `infra/compute/NAME.yaml`; NAME is CRESCENDO_COMPUTE or `local` unless given."""
    name = name or os.environ.get(PROFILE_VARIABLE) or "local"
    folder = Path(root, "infra", "compute")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
        problem = f"there is no compute profile {name!r} in infra/compute"
        raise ConfigError("E-CFG-007", PROFILE_VARIABLE, problem, f"choose one of: {known}")
    return _parse(ComputeProfile, _read_yaml(folder / f"{name}.yaml"), f"infra/compute/{name}.yaml")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    source, fix = path.name, "correct this line"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputMissing(
            "E-INP-001", str(path), "is missing", "run inside a checkout of the project"
        ) from None
    if len(content) > _MAX_BYTES:
        raise ConfigError("E-CFG-005", source, f"has {len(content)} bytes", f"keep it below {_MAX_BYTES}")
    try:
        tree = YAML(typ="safe").load(content.decode("utf-8"))
    except MarkedYAMLError as exc:
        line = f"line {exc.problem_mark.line + 1}: " if exc.problem_mark else ""
        problem = str(exc.problem or exc.context or "cannot be parsed").strip().split("\n")[0]
        raise ConfigError("E-CFG-005", source, f"{line}{problem}", fix) from None
    except (YAMLError, RecursionError, ValueError) as exc:
        problem = f"is not YAML 1.2 in UTF-8 ({type(exc).__name__})"
        raise ConfigError("E-CFG-005", source, problem, "write plain keys and values") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError("E-CFG-005", source, f"holds a {type(tree).__name__}", "write keys and values")
    return tree


def _freeze(value: Any, budget: list[int]) -> Any:
    """Lists as tuples, which strict models want; `budget` stops a few lines of aliases from exploding."""
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"more than {_MAX_NODES} values")
    if isinstance(value, Mapping):
        return {key: _freeze(item, budget) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_freeze(item, budget) for item in value)
    return value


def _parse(model: type[_Model], tree: Mapping[str, Any], source: str) -> _Model:
    try:
        frozen = _freeze(tree, [_MAX_NODES])
    except (ValueError, RecursionError) as exc:
        raise ConfigError("E-CFG-005", source, f"is too large ({exc})", "remove YAML aliases") from None
    try:
        return model.model_validate(frozen)
    except ValidationError as exc:
        # An unknown key is most often a misspelt one, which would be reported as missing too.
        first = min(exc.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise _explain(model, dict(first), source) from None


def _explain(model: type[Section], error: dict[str, Any], source: str) -> ConfigError:
    location = tuple(error["loc"])
    where = f"{source}: {_dotted(location)}" if location else source
    if error["type"] == "extra_forbidden":
        return ConfigError("E-CFG-001", where, "unknown key", _suggest(model, location))
    if error["type"] == "missing":
        return ConfigError("E-CFG-003", where, "missing key", "add it (git log -p shows its last value)")
    if error["type"] == "value_error":
        problem, _, fix = str(error["ctx"]["error"]).partition(". Fix: ")
        key, _, rest = problem.partition(": ")
        where = f"{source}: {_dotted((*location, key))}"
        return ConfigError("E-CFG-004", where, rest, fix or "change one of the two, or this value")
    message = str(error["msg"])
    message = message[:1].lower() + message[1:]
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ConfigError("E-CFG-002", where, f"{shown} is not valid", message)


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _suggest(model: type[Section], location: tuple[Any, ...]) -> str:
    """What the misspelt last key of `location` may have meant."""
    for part in location[:-1]:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [inner, *get_args(inner)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"remove it, or use one of: {', '.join(known)}"
