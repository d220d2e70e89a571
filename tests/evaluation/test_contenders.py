"""Costs equal what is really computed; settings use up their budget; the baseline is the best of them."""

import itertools
from dataclasses import replace

import pytest
import torch

from pipeline.diffusion.schedule import grids
from pipeline.errors import ConfigError
from pipeline.evaluation.contenders import (
    TOLERANCE,
    Budget,
    Contender,
    budgets_of,
    call_costs,
    choose,
    cost_of,
    has_early_exit,
    is_finite,
    measure_cost,
    settings_within,
)
from pipeline.evaluation.entry import passes_to_measure
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.counting import flops
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.snapshot import Snapshot
from tests.builders import build_pyramid, snapshot_config

CORE = {"patch": 1, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 2, "channels": 8, "num_blocks": 1}
GUIDED = SamplerSettings(
    8, "sde_dpmpp_2m", guidance=1.5, guidance_interval=(0.3, 5.0), handover=(8.0,), early_exit=False
)
TEXT = Conditioning(torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def snapshot(
    kind: str = "finetuned", shells: int = 1, regions: bool = False, resolution: int = 8
) -> Snapshot:
    """An untrained model of 8 px (or another resolution) and one octave per shell, with early weights."""
    core, shell = ({**net, "regions": regions} for net in (CORE, SHELL))
    whole, early = (
        build_pyramid(resolution, [0.01] * shells, core=core, shell=shell, dim=4, seed=seed)
        for seed in (0, 1)
    )
    config = snapshot_config(whole, "finetuned", CORE, [SHELL] * shells, sampling=GUIDED)
    if kind == "refined":
        config = replace(config, kind="refined", passes=(1, 2, 4), sigma_start=5.0)
    return Snapshot(whole.eval().requires_grad_(False), config, "", early.eval().requires_grad_(False))


CONTENDERS = [
    Contender("default", "finetuned"),
    Contender("heun", "finetuned", settings=replace(GUIDED, sampler="heun", num_steps=6)),
    Contender("odd", "finetuned", settings=replace(GUIDED, guidance=1.0), steps=(3, 2)),
    Contender("guided", "finetuned", settings=GUIDED, steps=(3, 4)),
    Contender("least", "finetuned", settings=replace(GUIDED, guidance=1.0), steps=(1, 1)),
    Contender("low band", "finetuned", settings=replace(GUIDED, guide="low_band"), steps=(4, 4)),
    Contender("heun by level", "finetuned", settings=replace(GUIDED, sampler="heun"), steps=(3, 3)),
    Contender("early weights", "finetuned", settings=replace(GUIDED, guide="early_weights"), steps=(3, 4)),
    Contender(
        "early weights, heun", "finetuned", settings=replace(GUIDED, guide="early_weights", sampler="heun")
    ),
]


@pytest.mark.parametrize("shells", [1, 2])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda each: each.name)
def test_calls_and_multiply_adds_equal_those_of_a_real_run(contender: Contender, shells: int) -> None:
    model = snapshot(shells=shells)
    if contender.steps is not None:
        contender = replace(contender, steps=(*contender.steps, *contender.steps[1:])[: 1 + shells])
    cost = cost_of(contender, model, call_costs(model, TEXT))
    assert cost.nfe == contender.sample(model, TEXT, [0]).nfe
    counted = flops(lambda: contender.sample(model, TEXT, [0])) // 2
    assert cost.multiply_adds == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("steps", [None, (3, 4)])
def test_regions_are_guided_in_every_step(guidance: float, steps: tuple[int, ...] | None) -> None:
    """Their noise levels differ, so that some patch may lie within the interval at every step."""
    model = snapshot(regions=True)
    settings = replace(GUIDED, sampler="adaptive", guidance=guidance, guidance_interval=(0.3, 1.0))
    contender = Contender("adaptive", "finetuned", settings=settings, steps=steps)
    cost = cost_of(contender, model, call_costs(model, TEXT))
    assert cost.nfe == contender.sample(model, TEXT, [0]).nfe
    counted = flops(lambda: contender.sample(model, TEXT, [0])) // 2
    assert cost.multiply_adds == pytest.approx(counted, rel=0.02)  # the difficulty of patches is not counted


def test_the_cost_of_early_exit_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.diffusion.generate.HALF_A_GREY_LEVEL", 0.5)  # some tiles finish
    model = snapshot(resolution=32)
    plain = Contender("plain", "finetuned", settings=replace(GUIDED, num_steps=12))
    early = Contender("early", "finetuned", settings=replace(GUIDED, num_steps=12, early_exit=True))
    assert has_early_exit(early, model)
    assert not has_early_exit(plain, model)
    assert not has_early_exit(early, snapshot("refined"))
    text = TEXT.select(torch.zeros(3, dtype=torch.long))
    whole, cost = (measure_cost(each, model, text) for each in (plain, early))
    assert cost.nfe == whole.nfe == cost_of(early, model, call_costs(model, TEXT)).nfe
    assert cost.multiply_adds < whole.multiply_adds
    assert whole.multiply_adds == pytest.approx(
        cost_of(plain, model, call_costs(model, TEXT)).multiply_adds, rel=0.01
    )


@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("shells", [1, 2])
def test_passes_share_the_work_of_the_levels_below(passes: int, shells: int) -> None:
    model = snapshot("refined", shells)
    contender = Contender("refined", "refined", passes=passes)
    cost = cost_of(contender, model, call_costs(model, TEXT))
    assert cost.nfe == contender.sample(model, TEXT, [0]).nfe == passes + shells
    counted = flops(lambda: contender.sample(model, TEXT, [0])) // 2
    assert cost.multiply_adds == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("shells", [1, 2])
@pytest.mark.parametrize("limit", [3, 5, 8])
def test_settings_fit_their_budget_and_leave_no_room_for_a_step(limit: int, shells: int) -> None:
    model = snapshot(shells=shells)
    costs = [1] * (1 + shells)
    found = settings_within(model, "finetuned", costs, Budget("eight_calls", limit, "nfe"))
    assert found
    for each in found:
        assert each.steps is not None
        assert min(each.steps) >= 1
        assert cost_of(each, model, costs).nfe <= limit
        if each.settings is not None and each.settings.guidance == 1:
            assert sum(each.steps) == limit
    assert len({(each.steps, each.describe()) for each in found}) == len(found)


def test_the_settings_that_are_tried_are_those_nearest_to_the_samplers_own_grid() -> None:
    model = snapshot(shells=2)
    found = settings_within(model, "finetuned", [1, 1, 1], Budget("eight_calls", 16, "nfe"))
    steps = [each.steps for each in found if each.steps is not None]
    own = [
        [
            len(grid) - 1
            for grid in grids(pyramid_levels(model.denoiser), replace(GUIDED, num_steps=sum(each)))
        ]
        for each in steps
    ]
    moved = [sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(steps, own, strict=True)]
    assert moved == sorted(moved) and moved[0] == 0


def test_a_budget_below_one_call_of_each_level_has_no_setting() -> None:
    chosen, tried = choose(
        snapshot(), "finetuned", [20, 50], Budget("equal_cost_1", 68, "multiply_adds"), lambda _: 0.0
    )
    assert chosen is None
    assert not tried


def test_the_setting_of_least_distance_is_chosen() -> None:
    wanted = (4, 4)

    def distance(contender: Contender) -> float:
        guided = contender.settings is not None and contender.settings.guidance != 1
        return 0.0 if contender.steps == wanted and not guided else 1.0

    chosen, tried = choose(snapshot(), "finetuned", [1, 5], Budget("eight_calls", 8, "nfe"), distance)
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
    budgets = budgets_of(passes)
    assert [each.name for each in budgets] == ["equal_cost_1", "equal_cost_4", "eight_calls"]
    for a, b in itertools.pairwise([*(each.limit for each in budgets[:2])]):
        assert a < b
    for budget in budgets[:2]:
        for each in settings_within(snapshot(), "finetuned", costs, budget):
            assert cost_of(each, snapshot(), costs).multiply_adds <= TOLERANCE * budget.limit


def test_only_passes_that_the_refine_stage_kept_are_measured_and_the_others_named() -> None:
    model, lines = snapshot("refined"), []
    assert passes_to_measure(model, (4, 1), lines.append) == [1, 4] and not lines
    few = model._replace(config=replace(model.config, passes=(2, 4)))
    assert passes_to_measure(few, (1, 2), lines.append) == [2]
    assert lines[0].startswith("refined_1: not measured: the refine stage found nothing gained")
    with pytest.raises(ConfigError, match=r"has \[1\], of which models/refined has none; it has \[2, 4\]"):
        passes_to_measure(few, (1,), lines.append)
