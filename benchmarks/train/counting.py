"""Parameters and multiply-adds of our networks and of the peers', and the search for plans of equal cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch

from benchmarks.train.crescendo import RandomBatches, build_levels
from benchmarks.train.peers import BUILDERS, PLANS, WIDTHS
from benchmarks.train.settings import Cost, Plan, Size
from pipeline.models.counting import count_parameters, flops

TOLERANCE = 0.1  # of what is to be equal


def own_cost(size: Size) -> Cost:
    """Of all levels, in one pass, without allocating them."""
    text = RandomBatches(1, 1).text.to("meta")
    with torch.device("meta"), torch.no_grad():
        top = build_levels(size)[-1]
        images = torch.zeros(1, 3, top.resolution, top.resolution)
        return Cost(count_parameters(top), flops(lambda: top(images, torch.ones(1), text)) / 2)


@cache
def peer_cost(name: str, plan: Plan, resolution: int) -> Cost:
    """Of a plan, without allocating it."""
    with torch.device("meta"), torch.no_grad():
        net = BUILDERS[name](plan, resolution)
        images, times = torch.zeros(1, 3, resolution, resolution), torch.zeros(1, dtype=torch.long)
        return Cost(count_parameters(net), flops(lambda: net(images, times)) / 2)


def plans_near(name: str, resolution: int, target: float, of: Callable[[Cost], float]) -> Iterator[Plan]:
    """For each kind of plan, the two widths about the target."""
    for multiples, blocks in PLANS[name]:
        if resolution >> (len(multiples) - 1) < 2:
            continue
        low, high = 0, len(WIDTHS) - 1
        while high - low > 1:
            middle = (low + high) // 2
            small = of(peer_cost(name, Plan(WIDTHS[middle], multiples, blocks), resolution)) < target
            low, high = (middle, high) if small else (low, middle)
        yield from (Plan(WIDTHS[i], multiples, blocks) for i in (low, high))


def choose(name: str, resolution: int, target: Cost, equal: str) -> Plan:
    """The first kind of plan that can be within 10% of the target; else the nearest plan."""
    field_ = {"parameters": "parameters", "multiply-adds": "macs"}[equal]
    goal = getattr(target, field_)

    def distance(plan: Plan) -> float:
        return abs(getattr(peer_cost(name, plan, resolution), field_) / goal - 1)

    missed = []
    for plan in plans_near(name, resolution, goal, lambda cost: getattr(cost, field_)):
        if distance(plan) <= TOLERANCE:
            return plan
        missed.append(plan)
    return min(missed, key=distance)
