"""What is compared: a model and a way to sample it, with the cost of an image.

The refined model in few passes competes with the fine-tuned one at equal cost, not with its default of many
calls. So the fine-tuned model gets, for the cost of each number of passes and for EIGHT calls, its best
setting of steps by level and guidance, chosen on training captions by KID (`choose`). Cost is counted in
multiply-adds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipeline.adversarial.few_step import generate_refined
from pipeline.diffusion.generate import BATCH, Generated, generate
from pipeline.diffusion.samplers import ADAPTIVE
from pipeline.diffusion.schedule import grids, steps_by_level
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.counting import flops
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.shape import SQUARE, Shape
from pipeline.models.snapshot import Snapshot

EIGHT = 8  # calls of the fine-tuned model's setting for a small fixed budget
MAX_SETTINGS = 4  # that are tried for one budget
TOLERANCE = (
    1.02  # by which a setting may cost more than the budget: the fine-tuned model gets what is nearest
)


@dataclass(frozen=True)
class Contender:
    """A model, by its name among the snapshots, and how it is sampled.

    passes: of a refined model. settings, steps: of others, in place of the snapshot's own (see `generate`)."""

    name: str
    model: str
    passes: int | None = None
    settings: SamplerSettings | None = None
    steps: tuple[int, ...] | None = None

    def sample(
        self,
        snapshot: Snapshot,
        text: Conditioning,
        seeds: Sequence[int],
        batch_size: int = BATCH,
        shape: Shape = SQUARE,
    ) -> Generated:
        """One image of `shape` per caption and seed; `nfe` counts the calls of all levels."""
        if snapshot.config.is_refined:
            images = generate_refined(snapshot, text, seeds, self.passes, batch_size, shape).images
            passes = self.passes or min(snapshot.config.passes)
            return Generated(images, passes + len(snapshot.config.shells))
        return generate(snapshot, text, seeds, self.settings, batch_size, self.steps, shape)

    def describe(self) -> str:
        """How it is sampled, as in `4+4 steps, guidance off`; empty for the snapshot's own setting."""
        if self.steps is None:
            return ""
        guided = self.settings is not None and self.settings.guidance != 1
        return f"{'+'.join(map(str, self.steps))} steps, guidance {'on' if guided else 'off'}"


@dataclass(frozen=True)
class Cost:
    """Of one image."""

    nfe: int  # denoiser calls, of any level
    multiply_adds: int


def call_costs(snapshot: Snapshot, text: Conditioning) -> list[int]:
    """Multiply-adds of one call of each level, core first, for one image. A shell's call includes all levels
    below."""
    costs = []
    for level in pyramid_levels(snapshot.denoiser):
        x = torch.zeros(1, 3, level.resolution, level.resolution, device=next(level.parameters()).device)
        one, sigma = text.select(slice(0, 1)).to(x.device), torch.ones(1, device=x.device)
        with torch.no_grad():
            costs.append(flops(functools.partial(level, x, sigma, one)) // 2)
    return costs


def cost_of(contender: Contender, snapshot: Snapshot, costs: Sequence[int]) -> Cost:
    """The cost of an image, given that of one call of each level (`call_costs`), without early exit (see
    `measure_cost`). A refined model's shells add to an estimate that is there already, so that its passes share the
    work of the levels below."""
    if snapshot.config.is_refined:
        passes = contender.passes or min(snapshot.config.passes)
        return Cost(passes + len(costs) - 1, (passes - 1) * costs[0] + costs[-1])
    settings = contender.settings or snapshot.config.sampling
    nfe = multiply_adds = 0
    # Early weights guide a shell around the estimate of the finished level below, and so on down to the core.
    guide_costs = itertools.accumulate(costs) if settings.guide == "early_weights" else costs
    calls = _calls_by_level(snapshot, settings, contender.steps)
    for (own, of_guide), cost, guide_cost in zip(calls, costs, guide_costs, strict=True):
        nfe += own + of_guide
        multiply_adds += own * cost + of_guide * guide_cost
    return Cost(nfe, multiply_adds)


def measure_cost(contender: Contender, snapshot: Snapshot, text: Conditioning) -> Cost:
    """The mean cost of images of the captions `text`, counted while they are sampled: with early exit it depends on
    the image."""
    made: list[Generated] = []
    seeds = range(len(text.pooled))
    total = flops(lambda: made.append(contender.sample(snapshot, text, seeds))) // 2
    return Cost(made[0].nfe, total // len(seeds))


def has_early_exit(contender: Contender, snapshot: Snapshot) -> bool:
    """Whether tiles of its images may leave the computation."""
    settings = contender.settings or snapshot.config.sampling
    return settings.early_exit and not snapshot.config.is_refined


def _calls_by_level(
    snapshot: Snapshot, settings: SamplerSettings, steps: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Calls of the denoiser and of its guide of each level, core first, as `sample_pyramid` makes them. Heun's
    method makes two a step, except the last."""
    pyramid = pyramid_levels(snapshot.denoiser)
    in_core_units = pyramid[0].resolution / pyramid[-1].resolution
    low, high = settings.guidance_interval
    calls = []
    for level, sigmas in zip(pyramid, grids(pyramid, settings, steps), strict=True):
        grid = sigmas.float()  # as the networks get them
        free = settings.guide == "low_band" and level is not pyramid[0]
        visited = grid if settings.sampler == "heun" else grid[:-1]
        levels = visited[visited > 0].tolist() + (grid[1:-1].tolist() if settings.sampler == "heun" else [])
        guided = sum(low <= sigma * in_core_units <= high for sigma in levels)
        if settings.sampler == ADAPTIVE and level is pyramid[-1]:
            guided = len(levels)  # the noise levels of its patches differ
        calls.append((len(levels), 0 if free or settings.guidance == 1 else guided))
    return calls


# --- The fine-tuned model at a budget.


@dataclass(frozen=True)
class Budget:
    """A budget of the fine-tuned model, and the name of the contender that has it."""

    name: str
    limit: int
    unit: Literal["nfe", "multiply_adds"]

    def holds(self, cost: Cost) -> bool:
        """Whether an image costs at most as much, or TOLERANCE times it."""
        return bool(getattr(cost, self.unit) <= self.limit * TOLERANCE)


def settings_within(snapshot: Snapshot, model: str, costs: Sequence[int], budget: Budget) -> list[Contender]:
    """The settings of a model that use up a budget: no level has room for another step.

    `costs`: of one call of each level, core first. Every level makes at least one call; where the budget allows
    none, there is no setting. Of more than MAX_SETTINGS those nearest to the sampler's own shares are returned."""
    own = snapshot.config.sampling
    found = []
    for guidance in sorted({1.0, own.guidance}):
        whole = Contender(budget.name, model, settings=replace(own, guidance=guidance, early_exit=False))
        found += [replace(whole, steps=steps) for steps in _steps_within(snapshot, whole, costs, budget)]
    # With guidance that no step has, a setting is that without guidance.
    distinct = {(each.steps, cost_of(each, snapshot, costs)): each for each in reversed(found)}
    ordered = sorted(
        distinct.values(), key=lambda each: (_from_own(each, snapshot), each.steps, each.describe())
    )
    return ordered[:MAX_SETTINGS]


def _steps_within(
    snapshot: Snapshot, contender: Contender, costs: Sequence[int], budget: Budget
) -> Iterator[tuple[int, ...]]:
    """Steps of each level that a budget holds, without room for another one on any level."""

    @functools.cache
    def fits(steps: tuple[int, ...]) -> bool:
        return budget.holds(cost_of(replace(contender, steps=steps), snapshot, costs))

    units = [1] * len(costs) if budget.unit == "nfe" else costs
    for steps in itertools.product(*(range(1, int(budget.limit * TOLERANCE / unit) + 1) for unit in units)):
        more = (steps[:i] + (steps[i] + 1,) + steps[i + 1 :] for i in range(len(steps)))
        if fits(steps) and not any(map(fits, more)):
            yield steps


def _from_own(contender: Contender, snapshot: Snapshot) -> int:
    """How many steps other levels make than in the sampler's own grid of as many steps, times 2."""
    assert contender.steps is not None and contender.settings is not None
    settings = replace(contender.settings, num_steps=sum(contender.steps))
    own = steps_by_level(pyramid_levels(snapshot.denoiser), settings)
    return sum(abs(a - b) for a, b in zip(contender.steps, own, strict=True))


def choose(
    snapshot: Snapshot,
    model: str,
    costs: Sequence[int],
    budget: Budget,
    distance: Callable[[Contender], float],
) -> tuple[Contender | None, dict[str, float]]:
    """The setting of least `distance` within a budget (None where there is no setting), and all distances.

    `costs`: see `settings_within`."""
    tried = settings_within(snapshot, model, costs, budget)
    if len(tried) == 1:
        return tried[0], {}
    distances = {each: distance(each) for each in tried}
    best = min(tried, key=lambda each: distances[each], default=None)
    return best, {each.describe(): value for each, value in distances.items()}


def budgets_of(passes: Mapping[int, Cost]) -> list[Budget]:
    """The cost of each number of passes of the refined model, and EIGHT calls."""
    equal = [
        Budget(f"equal_cost_{n}", cost.multiply_adds, "multiply_adds") for n, cost in sorted(passes.items())
    ]
    return [*equal, Budget("eight_calls", EIGHT, "nfe")]


def is_finite(snapshot: Snapshot) -> bool:
    """Whether all weights are finite, those of its guide too."""
    parts = [snapshot.denoiser, *([] if snapshot.early is None else [snapshot.early])]
    return all(bool(torch.isfinite(each).all()) for part in parts for each in part.state_dict().values())
