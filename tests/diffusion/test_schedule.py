"""The grid of noise levels: handovers, shares of the steps, and where the steps of a level lie."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations

import pytest
import torch

from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.samplers import MAX_RATIO, History
from pipeline.diffusion.schedule import (
    MAX_LAST_SIGMA,
    SCHEDULES,
    grids,
    handovers,
    nodes,
    share_steps,
    steps_by_level,
)
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import Denoiser, pyramid_levels
from tests.builders import build_pyramid


@pytest.fixture(scope="module")
def pyramid() -> list[Denoiser]:
    """A core of 8 px and two shells, which expect errors that grow with the noise."""
    levels = pyramid_levels(build_pyramid(8, (0.04, 0.02)))
    torch.manual_seed(0)
    for level in levels:
        torch.nn.init.constant_(level.logvar.gain, 1.0)
    return levels


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [(1, 1, 1), (3, 1, 2), (5, 4, 3)])
def test_each_level_makes_its_steps_from_its_handover_to_the_next(
    pyramid: list[Denoiser], schedule: str, steps: tuple[int, int, int]
) -> None:
    settings = SamplerSettings(99, "sde_dpmpp_2m", schedule=schedule)
    visited = grids(pyramid, settings, steps)
    assert [len(grid) - 1 for grid in visited] == list(steps)
    assert float(visited[0][0]) == pytest.approx(80 * pyramid[-1].resolution / pyramid[0].resolution)
    assert float(visited[-1][-1]) == 0
    for i, shell in enumerate(pyramid[1:]):
        assert float(visited[i][-1]) == float(visited[i + 1][0])
        at_top = 8 * shell.sigma_high_band * pyramid[-1].resolution / shell.resolution
        assert float(visited[i][-1]) == pytest.approx(at_top)
    assert all(bool((grid.diff() < 0).all()) for grid in visited)
    text = Conditioning(torch.zeros(2, 8), torch.zeros(2, 2, 8), torch.zeros(2, 2, dtype=torch.bool))
    images, nfe = sample_pyramid(pyramid[-1], text, [0, 1], settings, steps=steps)
    assert nfe == sum(steps) and images.isfinite().all()


def test_one_handover_serves_all_shells_and_of_several_each_moves_its_own(pyramid: list[Denoiser]) -> None:
    assert handovers(pyramid, [8.0]) == handovers(pyramid, [8.0, 8.0])
    both, first = handovers(pyramid, [8.0, 8.0]), handovers(pyramid, [2.0, 8.0])
    assert first == [both[0] / 4, both[1]]


@pytest.mark.parametrize("handover", [(1000.0,), (1.0, 1000.0)])
def test_levels_fall_even_where_a_handover_is_set_above_the_one_before(
    pyramid: list[Denoiser], handover: tuple[float, ...]
) -> None:
    visited = grids(pyramid, SamplerSettings(9, handover=handover))
    sigmas = torch.cat([visited[0], *(grid[1:] for grid in visited[1:])])
    assert bool((sigmas.diff() < 0).all())
    assert all(float(above[0]) <= float(below[0]) / 2 for below, above in pairwise(visited))


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, [1, 1, 1]),
        (4, [1, 1, 2]),
        (5, [2, 1, 2]),
        (8, [4, 1, 3]),
        (12, [7, 1, 4]),
        (14, [9, 1, 4]),
        (15, [9, 2, 4]),
        (40, [32, 4, 4]),
    ],
)
def test_steps_are_shared_by_length_until_the_shells_have_enough(num_steps: int, expected: list[int]) -> None:
    assert share_steps(num_steps, [4.7, 1.0, 4.5], shell_steps=4) == expected
    assert share_steps(num_steps, [4.7], shell_steps=4) == [num_steps]
    assert share_steps(num_steps, [4.7, 1.0, 4.5], shell_steps=1)[1:] == [1, 1]


def test_levels_of_equal_length_make_equally_many_steps_the_finest_first() -> None:
    assert [share_steps(n, [2.0, 2.0], 4) for n in (3, 4, 8, 9)] == [[1, 2], [2, 2], [4, 4], [5, 4]]


@pytest.mark.parametrize("num_steps", [3, 6, 9, 16, 40])
def test_no_level_has_a_step_that_another_one_needs_more(pyramid: list[Denoiser], num_steps: int) -> None:
    settings = SamplerSettings(num_steps, shell_steps=99)
    steps = steps_by_level(pyramid, settings)
    assert sum(steps) == num_steps
    visited = grids(pyramid, settings)
    assert [len(grid) - 1 for grid in visited] == steps
    lengths = [math.log(float(grid[0] / grid[-1])) for grid in visited[:-1]]
    for i, j in permutations(range(len(lengths)), 2):
        if steps[i] > 1:
            assert lengths[i] / steps[i] >= lengths[j] / (steps[j] + 1) - 1e-9


def test_a_core_alone_follows_the_published_law_of_karras(pyramid: list[Denoiser]) -> None:
    (grid,) = grids(pyramid[:1], SamplerSettings(16, schedule="karras"))
    torch.testing.assert_close(grid, karras_sigmas(16, 80.0, 0.002), rtol=1e-4, atol=0)


def test_steps_are_equal_in_what_the_schedule_measures(pyramid: list[Denoiser]) -> None:
    def spread(schedule: str, measure: Callable[[float], float]) -> float:
        found = nodes(schedule, pyramid[0], pyramid[0].resolution, 9, 40.0, 0.1)
        lengths = torch.tensor([measure(float(s)) for s in found]).diff().abs()
        return float(lengths.max() / lengths.min()) - 1

    levels = torch.linspace(math.log(0.05), math.log(50), 4001)
    error = pyramid[0].expected_error(levels.exp()).detach().double()
    rate = error / levels.double().exp() ** 2

    def information(power: float) -> Callable[[float], float]:
        passed = torch.cumulative_trapezoid(rate**power, levels.double())
        return lambda sigma: float(passed[int(torch.searchsorted(levels, math.log(sigma)))])

    assert spread("geometric", math.log) < 1e-3
    assert spread("karras", lambda sigma: sigma ** (1 / 7)) < 1e-3
    assert spread("entropic", information(1.0)) < 0.05
    assert spread("rescaled", information(0.25)) < 0.05
    assert spread("entropic", math.log) > 0.5


def test_the_expected_error_is_what_the_loss_calls_u(pyramid: list[Denoiser]) -> None:
    sigma = torch.tensor([0.3, 2.0])
    core, shell = pyramid[0], pyramid[1]
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(core.expected_error(sigma), core.logvar(sigma).exp() * c_out**2)
    v = shell.high_band_variance
    high = shell.logvar(sigma).exp() * sigma**2 * v / (sigma**2 + v) * 3 / 4
    torch.testing.assert_close(shell.expected_error(sigma), core.expected_error(sigma / 2) + high)


@pytest.mark.parametrize(("steps", "last"), [([1, 2], MAX_LAST_SIGMA), ([1, 9], 0.002)])
def test_few_steps_end_where_the_last_estimate_is_good_enough(
    pyramid: list[Denoiser], steps: Sequence[int], last: float
) -> None:
    assert float(grids(pyramid[:2], SamplerSettings(8), steps)[-1][-2]) == pytest.approx(last)


def test_a_long_step_after_a_short_one_extrapolates_no_further_than_its_bound() -> None:
    first, second = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    for long, ratio in ((1.2, 1.2), (40.0, MAX_RATIO)):
        history = History()
        history.extrapolate(first, torch.tensor(1.0))
        torch.testing.assert_close(history.extrapolate(second, torch.tensor(long)), second * (1 + ratio / 2))
