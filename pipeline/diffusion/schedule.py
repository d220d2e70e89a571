"""Which noise levels a sampler visits, and with which level of the pyramid.

Every handover to a shell is a level of the grid. The steps are shared by how far ln sigma falls on each level of
the pyramid: a shell between two others covers little of it. A schedule says how a level's steps lie between its
start and its end: in equal steps of ln sigma (`geometric`); by the law of Karras et al. (arXiv 2206.00364, eq. 5)
with rho = 7 (`karras`); or in equal steps of the information that they bring, dH / d ln sigma = E|x - D|^2 /
sigma^2 (Stancevic et al., arXiv 2504.13612), whole (`entropic`) or to the power of RESCALED (`rescaled`). The model
knows its own error: it learns u(sigma) while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import Denoiser, ShellDenoiser

SCHEDULES = ("geometric", "karras", "entropic", "rescaled")
RHO = 7.0
RESCALED = 0.25
POINTS = 513  # at which a density is integrated
MAX_STEP = 1.45  # in ln sigma, of the finest level down to the last sigma, which is thus higher for few steps
MAX_LAST_SIGMA = 0.05  # from there, a last estimate leaves an error of a few grey levels


def grids(
    pyramid: Sequence[Denoiser],
    settings: SamplerSettings,
    steps: Sequence[int] | None = None,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
) -> list[Tensor]:
    """Noise levels float64 of each level of a pyramid, core first, in units of the top resolution R: from
    sigma_max * R / R_core down to 0. The last one of a level is the first one of the next. A handover is at most
    half the level of the one before, however high it is set.

    steps: of each level, at least 1 (None: `steps_by_level`)."""
    steps = steps or steps_by_level(pyramid, settings, sigma_max)
    top = pyramid[-1].resolution
    starts = starts_of(pyramid, settings, sigma_max)
    *coarse, finest = zip(pyramid, steps, starts, strict=True)
    visited = [
        nodes(settings.schedule, level, top, n + 1, start, end)
        for (level, n, start), end in zip(coarse, starts[1:], strict=True)
    ]
    level, n, start = finest
    last = max(sigma_min, min(MAX_LAST_SIGMA, start * math.exp(-MAX_STEP * (n - 1))))
    return [*visited, torch.cat([nodes(settings.schedule, level, top, n, start, last), torch.zeros(1)])]


def steps_by_level(
    pyramid: Sequence[Denoiser], settings: SamplerSettings, sigma_max: float = 80.0
) -> list[int]:
    """The steps of each level, core first: `settings.num_steps`, shared by how far ln sigma falls on each level.
    The last step, to 0, counts as MAX_STEP."""
    starts = starts_of(pyramid, settings, sigma_max)
    lengths = [math.log(start / end) for start, end in pairwise(starts)]
    lengths.append(max(math.log(starts[-1] / MAX_LAST_SIGMA), 0) + MAX_STEP)
    return share_steps(settings.num_steps, lengths, settings.shell_steps)


def share_steps(num_steps: int, lengths: Sequence[float], shell_steps: int) -> list[int]:
    """One step for each level, of these lengths, core first; a second one for the finest, which a single step
    leaves blurred. Each further step goes to the level whose steps are the longest even with it (the finer one of
    equals), of a shell only up to `shell_steps`."""
    steps, finest = [1] * len(lengths), len(lengths) - 1
    for _ in range(num_steps - len(lengths)):
        have_room = [i for i, n in enumerate(steps) if i == 0 or n < shell_steps]
        gains = [(i == finest and steps[i] == 1, lengths[i] / (steps[i] + 1), i) for i in have_room]
        steps[max(gains)[-1]] += 1
    return steps


def starts_of(pyramid: Sequence[Denoiser], settings: SamplerSettings, sigma_max: float) -> list[float]:
    """The noise level at which each level starts, core first, in units of the top resolution."""
    starts = [sigma_max * pyramid[-1].resolution / pyramid[0].resolution]
    for handover in handovers(pyramid, settings.handover):
        starts.append(min(handover, starts[-1] / 2))
    return starts


def handover_of(handover: Sequence[float], octave: int) -> float:
    """The handover to shell number `octave`, 0 the coarsest: `handover` holds one for all shells, or one
    each."""
    return handover[min(octave, len(handover) - 1)]


def handovers(pyramid: Sequence[Denoiser], handover: Sequence[float]) -> list[float]:
    """Where each shell takes over, in units of the top resolution: `handover` times the RMS of its high band."""
    starts = []
    for octave, above in enumerate(pyramid[1:]):
        assert isinstance(above, ShellDenoiser)
        unit = pyramid[-1].resolution / above.resolution
        starts.append(handover_of(handover, octave) * above.sigma_high_band * unit)
    return starts


def nodes(schedule: str, level: Denoiser, top: int, count: int, start: float, end: float) -> Tensor:
    """`count` noise levels float64 from `start` down to `end`, in units of the resolution `top`; of one, the
    start."""
    ln_sigma = torch.linspace(math.log(start), math.log(end), POINTS, dtype=torch.float64)
    density = density_of(schedule, level, ln_sigma + math.log(level.resolution / top))
    passed = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density)])
    wanted = np.linspace(0, float(passed[-1]), count)
    found = torch.from_numpy(np.interp(wanted, passed.numpy(), ln_sigma.numpy())).exp()
    found[0] = start
    if count > 1:
        found[-1] = end
    return found


@torch.no_grad()
def density_of(schedule: str, level: Denoiser, ln_sigma: Tensor) -> Tensor:
    """Steps per unit of ln sigma, up to a factor, at levels float64 [n] in the unit of `level`."""
    if schedule == "geometric":
        return torch.ones_like(ln_sigma)
    if schedule == "karras":
        return (ln_sigma / RHO).exp()
    sigma = ln_sigma.exp().float().to(next(level.parameters()).device)
    rate = (level.expected_error(sigma) / sigma**2).double().cpu()
    return rate if schedule == "entropic" else rate**RESCALED
