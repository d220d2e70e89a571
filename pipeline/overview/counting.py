"""What the stages compute, counted from params.yaml: parameters, and float operations of convolutions and matrix
products by torch's own counter, on tensors that hold no values.

Counted are all updates, forward and backward, and all images that evaluate compares. What a stage computes beside
them is not: sample grids, checks, features of extractors, and activations that a profile has computed again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.adversarial.discriminator import (
    LITE0_SIDE,
    CoreFeatures,
    FrozenFeatures,
    Heads,
    Lite0Features,
    PixelFeatures,
)
from pipeline.adversarial.step import AdversarialSettings, AdversarialStep, PairedBatch
from pipeline.config.params import Params
from pipeline.data.augment import LABELS
from pipeline.data.dataset import Batch, PreparedDataset
from pipeline.diffusion.loss import denoising_loss, tiled_loss
from pipeline.diffusion.noise import LowBand
from pipeline.evaluation.conditions import SPLITS, plan_samples
from pipeline.evaluation.contenders import Contender, budgets_of, call_costs, cost_of, settings_within
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import CoreConfig, SamplerSettings, ShellConfig, SnapshotConfig
from pipeline.models.counting import count_parameters, flops
from pipeline.models.denoiser import PATCH, CoreDenoiser, Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.shape import SQUARE, Shape
from pipeline.models.snapshot import Snapshot, build
from pipeline.models.statistics import Statistics
from pipeline.models.tiles import trained_tiles
from pipeline.workers.finetune import growth_rounds, is_trained
from pipeline.workers.refine import refining_rounds
from pipeline.workers.settings import core_net, shell_nets, unpack

TEXT_DIM = 384  # numbers in a vector of a caption, where there are no data yet: those of minilm
HIGH_BAND = {64: 0.21, 128: 0.15, 256: 0.115}  # sqrt(v) of the emoji; beyond them, times FALL for each octave
FALL = 0.75
META = "meta"  # torch's device of tensors without values
STATISTICS = Statistics((0.0,) * 3, (0.6,) * 3)


class Workload(NamedTuple):
    """Of a stage. parameters, and multiply_adds of one call for one image: of the model that it makes; None where
    it makes none. flops: of the whole stage."""

    parameters: int | None
    multiply_adds: int | None
    flops: int


@dataclass(frozen=True)
class Data:
    """What the counts need of a data set: numbers in a vector of a caption, vectors of a caption, and how many
    images have which shape."""

    text_dim: int
    tokens: int
    shapes: Mapping[Shape, int]

    @classmethod
    def of(cls, dataset: PreparedDataset) -> Data:
        """Of prepared data."""
        side, encoder = dataset.resolution, dataset.text_encoder
        shapes = {Shape(b.height / side, b.width / side): b.num_images for b in dataset.buckets}
        return cls(int(str(encoder["dim"])), int(str(encoder["max_tokens"])), shapes)

    @classmethod
    def planned(cls, params: Params) -> Data:
        """Where nothing is prepared yet: squares, with captions as minilm encodes them."""
        return cls(TEXT_DIM, params.data.max_tokens, {SQUARE: 1})


def high_band(resolution: int) -> float:
    """sqrt(v) of a shell: measured on the emoji, extrapolated beyond them."""
    if resolution in HIGH_BAND:
        return HIGH_BAND[resolution]
    return HIGH_BAND[64] if resolution < 64 else FALL * high_band(resolution // 2)


def count_stages(params: Params, data: Data, start: int | None = None) -> dict[str, Workload]:
    """The workload of all stages but prepare. start: px of a pinned model, which finetune grows and whose core
    pretrain extracts; of the model of its size, not of others that evaluate compares."""
    networks = Networks(params, data)
    core, finest = networks.levels()[0], networks.levels()[-1]
    pretrained = (
        0 if start else params.pretrain.num_images * networks.denoising_flops(core, {core.resolution})
    )
    finetuned = 0
    for fresh in growth_rounds(params, start or core.resolution):
        levels = [level for level in networks.levels() if level.resolution <= fresh[-1]]
        trained = {each.resolution for each in levels if is_trained(params, each.resolution, fresh)}
        for level in levels:
            if level.resolution in trained:
                finetuned += params.finetune.num_images * networks.denoising_flops(level, trained)
    rounds = refining_rounds(params)
    refined = sum(
        rounds[level.resolution] * networks.refining_flops(level)
        for level in networks.levels()
        if level.resolution in rounds
    )
    return {
        "pretrain": networks.workload(core, pretrained),
        "finetune": networks.workload(finest, finetuned),
        "refine": networks.workload(finest, refined),
        "evaluate": Workload(None, None, networks.evaluation_flops()),
    }


def flops_of_samples(params: Params, nfe: Iterable[int], multiply_adds: Iterable[int]) -> int:
    """Float operations of all images that evaluate compares, by the costs of an image of each contender."""
    count = plan_samples(params.promotion.precision, params.evaluate.max_calls, sum(nfe)).count
    return 2 * len(SPLITS) * count * sum(multiply_adds)


class ShapesOnly:
    """A batch of one image, in place of those of a data set."""

    def __init__(self, size: tuple[int, int], text: Conditioning) -> None:
        self.batch = Batch(torch.empty(1, 3, *size, dtype=torch.uint8), 1, text, None)

    def at(self, nimg: int, shard: int) -> Batch:
        """The batch."""
        return self.batch


class Unshifted(AdversarialStep):
    """The update with images where they are: how far they are shifted would be a value."""

    @staticmethod
    def draw_shift(generator: torch.Generator, resolution: int) -> tuple[int, int]:
        """None."""
        return 0, 0


class Networks:
    """The networks of params.yaml, without values."""

    def __init__(self, params: Params, data: Data) -> None:
        self.params, self.data = params, data
        nets = zip(octaves_of(params), shell_nets(params), strict=True)
        self.config = SnapshotConfig(
            kind="finetuned",
            core=CoreConfig(params.core.resolution, core_net(params)),
            shells=tuple(ShellConfig(high_band(px) ** 2, net) for px, net in nets),
            text_encoder={"dim": data.text_dim},
            statistics=STATISTICS,
            sampling=SamplerSettings(**params.sampling.model_dump()),
        )
        with torch.device(META):
            self.denoiser = build(self.config)

    def levels(self) -> list[Denoiser]:
        """The pyramid, core first."""
        return pyramid_levels(self.denoiser)

    def workload(self, level: Denoiser, total: int) -> Workload:
        """Of a stage that makes a level, with its float operations."""
        place = self.levels().index(level)
        return Workload(count_parameters(level), self.call_costs[place], total)

    @cached_property
    def call_costs(self) -> list[int]:
        """Multiply-adds of one call of each level for one square image, core first."""
        with torch.device(META):
            return call_costs(self.snapshot(), self.text())

    def snapshot(self) -> Snapshot:
        """As a model, whose steps are shared without knowing what it will have learned."""
        sampling = replace(self.config.sampling, schedule="geometric", early_exit=False)
        return Snapshot(self.denoiser, replace(self.config, sampling=sampling), "")

    def text(self, labels: int = 0) -> Conditioning:
        """One caption."""
        dim, tokens = self.data.text_dim, self.data.tokens
        mask, augment = torch.ones(1, tokens, dtype=torch.bool), torch.empty(1, labels) if labels else None
        return Conditioning(torch.empty(1, dim), torch.empty(1, tokens, dim), mask, augment)

    def mean_over_shapes(self, count: Callable[[Shape], float]) -> int:
        """What an image costs, given what one of a shape does."""
        shapes = self.data.shapes
        return round(sum(count(shape) * n for shape, n in shapes.items()) / sum(shapes.values()))

    def denoising_flops(self, level: Denoiser, trained: Set[int]) -> int:
        """Of an update of a level on one image, forward and backward; `trained`: px of all levels that learn."""
        joint = self.params.finetune.core == "joint"
        self.denoiser.requires_grad_(False)
        for each in pyramid_levels(level):
            own = [module for name, module in each.named_children() if name != "below"]
            for module in own if each is level or (joint and each.resolution in trained) else ():
                module.requires_grad_(True)
            if isinstance(each, ShellDenoiser):
                each.joint = joint
        return self.mean_over_shapes(partial(self._denoising_flops, level))

    def _denoising_flops(self, level: Denoiser, shape: Shape) -> float:
        params, size = self.params, shape.at(level.resolution)
        with torch.device(META):
            images = torch.empty(1, 3, *size)
            labels = LABELS if params.augment.probability > 0 else 0
            sigma, bridge = torch.ones(1), 0.0
            if params.regions.probability > 0:
                patch = PATCH * level.resolution // params.core.resolution
                sigma = torch.ones(1, 1, *(side // patch for side in size))
                if params.regions.maps == "bridge":
                    bridge = params.regions.probability * self._forward_flops(level, images, labels)
            low = None
            if isinstance(level, ShellDenoiser) and level.net.bands:
                low = LowBand(torch.empty(1, 3, *shape.at(level.resolution // 2)), sigma)
            inputs = images, sigma, images, self.text(labels)
            if tiled := trained_tiles(level, size):
                shell, cut, count = tiled
                tiles = cut.from_index(torch.arange(count)), torch.ones(count)
                update = flops(lambda: tiled_loss(shell, *inputs, cut, tiles, low)[0].mean().backward())
            else:
                update = flops(lambda: denoising_loss(level, *inputs, low)[0].mean().backward())
            return update + bridge

    def refining_flops(self, level: Denoiser) -> int:
        """Of an update of discriminator and student, a level with all below it, on one image, forward and backward:
        the mean over numbers of passes, and over updates with and without penalty."""
        settings = unpack(AdversarialSettings, self.params.refine, seed=0)
        level.requires_grad_(True)
        return self.mean_over_shapes(partial(self._refining_flops, settings, level))

    def _refining_flops(self, settings: AdversarialSettings, level: Denoiser, shape: Shape) -> float:
        with torch.device(META):
            frozen = self.frozen_features(level.resolution)
            channels = [c for network in frozen for c in network.channels]
            heads = Heads(channels, self.data.text_dim, self.params.refine.head_channels)
            batch = ShapesOnly(shape.at(level.resolution), self.text())
            step = Unshifted(level, heads, frozen, batch, STATISTICS, settings)
            pairs: list[PairedBatch] = []
            made = flops(lambda: pairs.append(step.pair(0, 0, passes=1)))
            judge = partial(step.add_discriminator_gradient, pairs[0], 0, 0)
            plain, penalised = (flops(partial(judge, penalise)) for penalise in (False, True))
            heads.requires_grad_(False)
            learned = flops(partial(step.add_generator_gradient, pairs[0]))
            # Passes before the last are calls of the core, through which no gradient flows.
            core = self.levels()[0]
            further = self._forward_flops(core, torch.empty(1, 3, *shape.at(core.resolution)))
        mean_passes = sum(map(operator.mul, settings.passes, settings.pass_probs))
        penalty = (penalised - plain) / settings.penalty_interval
        return made + (mean_passes - 1) * further + plain + penalty + learned

    def _forward_flops(self, level: Denoiser, images: Tensor, labels: int = 0) -> int:
        with torch.no_grad():
            return flops(partial(level, images, torch.ones(1), self.text(labels)))

    def frozen_features(self, resolution: int) -> list[FrozenFeatures]:
        """What the discriminator sees of images of `resolution`, px."""
        names = self.params.refine.discriminators
        frozen: list[FrozenFeatures] = []
        if "self" in names:
            core = build(replace(self.config, shells=())).requires_grad_(False)
            assert isinstance(core, CoreDenoiser)
            frozen.append(CoreFeatures(core))
        if "lite0" in names:
            with torch.device("cpu"):
                lite0 = Lite0Features(STATISTICS, torch.zeros(1, 3, LITE0_SIDE, LITE0_SIDE))
            lite0.net.to(META)
            frozen.append(lite0)
        if "pixels" in names:
            frozen.append(PixelFeatures(resolution // self.params.core.resolution))
        return frozen

    def evaluation_flops(self) -> int:
        """Of all images that evaluate compares: of the refined model in each number of passes, of the fine-tuned
        one at every budget, and by its own settings."""
        params, costs, teacher = self.params, self.call_costs, self.snapshot()
        refined = teacher._replace(
            config=replace(teacher.config, kind="refined", passes=params.refine.passes)
        )
        wanted: Sequence[int] = params.evaluate.num_passes
        passes = {n: cost_of(Contender("", "", passes=n), refined, costs) for n in wanted}
        field = [*passes.values(), cost_of(Contender("", ""), teacher, costs)]
        for budget in budgets_of(passes):
            field += [
                cost_of(each, teacher, costs) for each in settings_within(teacher, "", costs, budget)[:1]
            ]
        return flops_of_samples(
            params, *zip(*((cost.nfe, cost.multiply_adds) for cost in field), strict=True)
        )


def octaves_of(params: Params) -> list[int]:
    """px of the shells."""
    return [px for fresh in growth_rounds(params, params.core.resolution) for px in fresh]
