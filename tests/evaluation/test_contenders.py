"""Costs equal what is really computed; settings use up their budget; the baseline is the best of them."""

import itertools
from dataclasses import replace

import pytest
import torch

from pipeline.evaluation.contenders import (
    TOLERANCE,
    Budget,
    Contender,
    budgets_of,
    call_costs,
    choose,
    cost_of,
    count_multiply_adds,
    is_finite,
    settings_within,
)
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import build_core, build_shell
from pipeline.models.snapshot import Snapshot
from tests.builders import snapshot_config

CORE = {"patch": 1, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 2, "channels": 8, "num_blocks": 1}
GUIDED = SamplerSettings(
    8, "sde_dpmpp_2m", guidance=1.5, guidance_interval=(0.3, 5.0), handover=(8.0,), early_exit=False
)
TEXT = Conditioning(torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def snapshot(kind: str = "finetuned", shells: int = 1) -> Snapshot:
    """An untrained model of 8 px and one octave per shell."""
    torch.manual_seed(0)
    whole = build_core(8, 4, CORE)
    for _ in range(shells):
        whole = build_shell(whole, 4, 0.01, SHELL)
    config = snapshot_config(whole, "finetuned", CORE, [SHELL] * shells, sampling=GUIDED)
    if kind == "refined":
        config = replace(config, kind="refined", passes=(1, 2, 4), sigma_start=5.0)
    return Snapshot(whole.eval().requires_grad_(False), config, "")


CONTENDERS = [
    Contender("default", "finetuned"),
    Contender("heun", "finetuned", settings=replace(GUIDED, sampler="heun", num_steps=6)),
    Contender("odd", "finetuned", settings=replace(GUIDED, guidance=1.0), steps=(3, 2)),
    Contender("guided", "finetuned", settings=GUIDED, steps=(3, 4)),
    Contender("least", "finetuned", settings=replace(GUIDED, guidance=1.0), steps=(1, 1)),
    Contender("low band", "finetuned", settings=replace(GUIDED, guide="low_band"), steps=(4, 4)),
    Contender("heun by level", "finetuned", settings=replace(GUIDED, sampler="heun"), steps=(3, 3)),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda each: each.name)
def test_calls_and_multiply_adds_equal_those_of_a_real_run(contender: Contender) -> None:
    model = snapshot()
    cost = cost_of(contender, model, call_costs(model, TEXT))
    assert cost.nfe == contender.sample(model, TEXT, [0]).nfe
    counted = count_multiply_adds(lambda: contender.sample(model, TEXT, [0]))
    assert cost.multiply_adds == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("shells", [1, 2])
def test_passes_share_the_work_of_the_levels_below(passes: int, shells: int) -> None:
    model = snapshot("refined", shells)
    contender = Contender("refined", "refined", passes=passes)
    cost = cost_of(contender, model, call_costs(model, TEXT))
    assert cost.nfe == contender.sample(model, TEXT, [0]).nfe == passes + shells
    counted = count_multiply_adds(lambda: contender.sample(model, TEXT, [0]))
    assert cost.multiply_adds == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("shells", [1, 2])
@pytest.mark.parametrize("limit", [3, 5, 8])
def test_settings_fit_their_budget_and_leave_no_room_for_a_step(limit: int, shells: int) -> None:
    model = snapshot(shells=shells)
    costs = [1] * (1 + shells)
    found = settings_within(model, "eight_calls", "finetuned", costs, limit)
    assert found
    for each in found:
        assert each.steps is not None
        assert min(each.steps) >= 1
        assert cost_of(each, model, costs).nfe <= limit
        if each.settings is not None and each.settings.guidance == 1:
            assert sum(each.steps) == limit
    assert len({(each.steps, each.describe()) for each in found}) == len(found)


def test_a_budget_below_one_call_of_each_level_has_no_setting() -> None:
    chosen, tried = choose(snapshot(), "finetuned", Budget("equal_cost_1", [2, 5], 6.8), lambda _: 0.0)
    assert chosen is None
    assert not tried


def test_the_setting_of_least_distance_is_chosen() -> None:
    wanted = (2, 6)

    def distance(contender: Contender) -> float:
        guided = contender.settings is not None and contender.settings.guidance != 1
        return 0.0 if contender.steps == wanted and not guided else 1.0

    chosen, tried = choose(snapshot(), "finetuned", Budget("eight_calls", [1, 1], 8), distance)
    assert chosen is not None
    assert chosen.steps == wanted
    assert tried[chosen.describe()] == 0.0
    assert len(tried) > 3


def test_a_weight_that_is_not_finite_is_found_in_buffers_and_in_the_guide_too() -> None:
    good, bad = snapshot(), snapshot()
    assert is_finite(good)
    assert is_finite(good._replace(early=snapshot().denoiser))
    next(bad.denoiser.buffers())[0] = torch.nan
    assert not is_finite(bad)
    assert not is_finite(good._replace(early=bad.denoiser))


def test_budgets_are_the_cost_of_each_number_of_passes_and_eight_calls() -> None:
    model = snapshot("refined")
    costs = call_costs(model, TEXT)
    passes = {n: cost_of(Contender("", "", passes=n), model, costs) for n in (1, 4)}
    budgets = budgets_of(costs, passes)
    assert [each.name for each in budgets] == ["equal_cost_1", "equal_cost_4", "eight_calls"]
    for a, b in itertools.pairwise([*(each.limit for each in budgets[:2])]):
        assert a < b
    for budget in budgets[:2]:
        for each in settings_within(snapshot(), budget.name, "finetuned", budget.costs, budget.limit):
            assert cost_of(each, snapshot(), costs).multiply_adds <= TOLERANCE * budget.limit
