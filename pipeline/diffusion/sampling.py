"""Samplers: from noise to images, counting every denoiser call (NFE).

Heun's method of Karras et al. (arXiv 2206.00364, algorithm 1) and DPM++(2M) for the deterministic path,
SDE-DPM++(2M) (both Lu et al., arXiv 2211.01095) for the stochastic one; coarse to fine, a trained pyramid is
sampled at low resolution first and lifted by fresh white noise in the high band; a refined model makes an image
in one, two or four passes. All state is float32 or better. Every image has a seed of its own, so that it depends on
the batch it was made in by rounding alone, and not at all among batches of one size (`registry.generator`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.adaptive import region_estimate, sde_dpmpp_2m_adaptive
from pipeline.diffusion.finish import Finish, OpenTiles
from pipeline.diffusion.guidance import Denoise, Guided, guide_of
from pipeline.diffusion.noise import karras_sigmas
from pipeline.errors import ConfigError
from pipeline.models.denoiser import PATCH, SIGMA_DATA, CoreDenoiser, Denoiser, ShellDenoiser, pyramid_levels
from pipeline.models.layers import Text, high_pass, upsample
from pipeline.models.snapshot import Snapshot
from pipeline.rng import key

HALF_A_GREY_LEVEL = 0.5 / 127.5 * SIGMA_DATA  # of standardised pixels, times their standard deviation

Draw = Callable[[str, int], Tensor]


class Generated(NamedTuple):
    """Images and what each cost."""

    images: Tensor  # uint8 [N,3,R,R] on the CPU
    nfe: int  # denoiser calls for one image
    share: float = 1.0  # of the work of its finest level that was done; less than 1 where tiles were finished


def noise_like_seeds(seeds: Sequence[int], device: str | torch.device = "cpu") -> Draw:
    """Return draw(purpose, resolution): standard normal [N,3,R,R], image i from seeds[i] alone.

    Drawn on the CPU, so that a seed means the same picture on every device."""

    def draw(purpose: str, resolution: int) -> Tensor:
        rows = [
            torch.randn(
                3, resolution, resolution, generator=torch.Generator().manual_seed(key(seed, purpose))
            )
            for seed in seeds
        ]
        return torch.stack(rows).to(device)

    return draw


def _full(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.full((len(x),), float(sigma), device=x.device, dtype=x.dtype)


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    """Integrate the probability-flow ODE from x [B,3,R,R] at sigmas[0] down to sigmas[-1].

    Second order except for a last step to 0, which is Euler's (2206.00364, algorithm 1)."""
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, _full(x, sigma), text)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            x = euler
        else:
            slope_next = (euler - denoise(euler, _full(x, sigma_next), text)) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x


@dataclass
class History:
    """What a method of two steps knows of the last one: the estimate [B,3,R,R], and h."""

    last: tuple[Tensor, Tensor] | None = None

    def extrapolate(self, denoised: Tensor, h: Tensor) -> Tensor:
        """D + (h / 2 h_prev)(D - D_prev), the estimate half a step ahead; D where there is no step before."""
        ahead = denoised
        if self.last is not None:
            ahead = denoised + (h / (2 * self.last[1])) * (denoised - self.last[0])
        self.last = denoised, h
        return ahead

    def lift(self) -> None:
        """Go on at twice the resolution: the low band has one law at both, of the high band nothing is known."""
        if self.last is not None:
            self.last = upsample(self.last[0]), self.last[1]


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, text: Text, history: History | None = None
) -> Tensor:
    """DPM++(2M) (2211.01095, algorithm 2): the probability-flow ODE from x [B,3,R,R] at sigmas[0] down to
    sigmas[-1], one call a step, second order by extrapolating the last two estimates.

    z' = (s'/s) z + (1 - s'/s) D~, with D~ as in `sde_dpmpp_2m`."""
    history = history or History()
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, _full(x, sigma), text)
        if sigma_next == 0:
            return denoised
        h = (sigma / sigma_next).log()
        gain = -torch.expm1(-h)  # 1 - s'/s
        x = (1 - gain) * x + gain * history.extrapolate(denoised, h)
    return x


def sde_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    text: Text,
    draw: Callable[[int], Tensor],
    history: History | None = None,
) -> Tensor:
    """SDE-DPM++(2M) (2211.01095): from x [B,3,R,R] at sigmas[0] down to sigmas[-1], one call and one
    draw a step, second order by extrapolating the last two estimates.

    z' = (s'/s)^2 z + (1 - (s'/s)^2) D~ + s' sqrt(1 - (s'/s)^2) eps,  D~ = D + (h / 2 h_prev)(D - D_prev),
    h = ln(s/s'); D~ = D on the last step, to 0, and on the first one without `history`. `draw(i)` gives the noise
    of step i."""
    history = history or History()
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, _full(x, sigma), text)
        if sigma_next == 0:
            return denoised
        h = (sigma / sigma_next).log()
        gain = -torch.expm1(-2 * h)  # 1 - (s'/s)^2
        x = (1 - gain) * x + gain * history.extrapolate(denoised, h) + sigma_next * gain.sqrt() * draw(i)
    return x


SAMPLERS = ("heun", "dpmpp_2m", "sde_dpmpp_2m")
ADAPTIVE = "adaptive"  # for models trained with regions, see `sample_pyramid`


def integrate(
    sampler: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    text: Text,
    draw: Callable[[int], Tensor],
    history: History | None = None,
) -> Tensor:
    """Run one of SAMPLERS from x [B,3,R,R] at sigmas[0] down to sigmas[-1], in the precision of x.

    A method of two steps goes on from `history`, and leaves there what it knows. ADAPTIVE is SDE-DPM++(2M) here,
    where all levels are equal."""
    if sampler == "heun":
        return heun(denoise, x, sigmas, text)
    if sampler == "dpmpp_2m":
        return dpmpp_2m(denoise, x, sigmas, text, history)
    return sde_dpmpp_2m(denoise, x, sigmas, text, draw, history)


def lift(low: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """From [B,3,R,R] at noise level sigma/2 to [B,3,2R,2R] at sigma: U low + HP(sigma noise).

    The noise of the result is exactly white; only the high band of the image is missing, so sigma must be
    several times its size."""
    return upsample(low) + high_pass(sigma * noise)


def lift_of(lift_at: float | Sequence[float], octave: int) -> float:
    """The lift to shell number `octave`, 0 the coarsest: of one number for all, or one a shell."""
    lifts = [lift_at] if isinstance(lift_at, float | int) else lift_at
    return lifts[min(octave, len(lifts) - 1)]


def steps_below(above: ShellDenoiser, top: int, sigmas: Tensor, lift_at: float) -> int:
    """How many steps of the grid `sigmas`, in units of the resolution `top`, come before the lift to `above`: until
    the noise is `lift_at` times the size of its high band, and at least one."""
    start = lift_at * above.sigma_high_band * top / above.resolution
    return max(int((sigmas > start).sum()), 1)


def _step_noise(draw: Draw, resolution: int, i: int) -> Tensor:
    return draw(f"step-{resolution}-{i}", resolution)


@torch.no_grad()
def sample_pyramid(
    denoiser: Denoiser,
    text: Text,
    seeds: Sequence[int],
    num_steps: int,
    guidance: float,
    interval: tuple[float, float],
    lift_at: float | Sequence[float],
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    sampler: str = "heun",
    guide: str = "no_text",
    early: Denoiser | None = None,
    finish: Finish | None = None,
) -> tuple[Tensor, int]:
    """Sample coarse to fine with one of SAMPLERS or ADAPTIVE, guided by one of GUIDES (`early`: the early weights).

    One grid of `num_steps` levels runs from sigma_max * R / R_core to sigma_min, in units of the top
    resolution; each shell of the pyramid takes over once sigma falls to `lift_at` (one number, or one a shell)
    times the size of its high band, and goes on with the history of a method of two steps. A lift needs one noise
    level everywhere, so that ADAPTIVE, for models trained with regions, lets levels differ on the finest level of
    the pyramid only, where it begins anew, and its guide is `no_text`. There, too, finished tiles leave the
    computation (`finish`, which counts what is left; all samplers but ADAPTIVE).

    Returns (standardised images [N,3,R,R], denoiser calls an image)."""
    draw = noise_like_seeds(seeds, text.pooled.device)
    pyramid = pyramid_levels(denoiser)
    guides = pyramid_levels(early) if early else [None] * len(pyramid)
    core = pyramid[0]
    top = denoiser.resolution
    sigmas = karras_sigmas(num_steps, sigma_max * top / core.resolution, sigma_min)
    x = draw("noise", core.resolution) * float(sigmas[0]) * core.resolution / top
    nfe, history = 0, History()
    for i, level in enumerate(pyramid):
        unit = level.resolution / top  # sigma here = sigma at the top * unit
        away = guide_of(guide, level, guides[i])
        guided = Guided(level, guidance, interval, core.resolution / level.resolution, away)
        noise = partial(_step_noise, draw, level.resolution)
        above = pyramid[i + 1] if i + 1 < len(pyramid) else None
        if isinstance(above, ShellDenoiser):
            n = steps_below(above, top, sigmas, lift_of(lift_at, i))
            x = integrate(sampler, guided, x, sigmas[: n + 1] * unit, text, noise, history)
            history.lift()
            x = lift(x, float(sigmas[n]) * 2 * unit, draw(f"lift-{above.resolution}", above.resolution))
            sigmas = sigmas[n:]
        elif sampler == ADAPTIVE:
            estimate = region_estimate(level, text, guidance, interval)
            patch = PATCH * level.resolution // core.resolution
            x = sde_dpmpp_2m_adaptive(estimate, x, sigmas * unit, noise, patch)
            nfe += (len(sigmas) - 1) * (1 if guidance == 1 else 2)
        elif finish is not None and isinstance(level, ShellDenoiser):
            guided.denoiser = tiles = OpenTiles(level, len(x), finish)
            x = integrate(sampler, tiles.finishing(guided), x, sigmas * unit, text, noise, history)
        else:
            x = integrate(sampler, guided, x, sigmas * unit, text, noise, history)
        nfe += guided.nfe
    return x, nfe


PASS_SIGMAS = {1: (), 2: (0.8,), 4: (1.9, 0.8, 0.3)}  # core levels after the first, by number of passes


def few_step(
    denoiser: Denoiser, text: Text, draw: Draw, passes: int, sigma_start: float, start: Tensor | None = None
) -> list[Tensor]:
    """Make images in `passes` calls of a refined model: the estimate of every level, core first.

    The core starts from noise at sigma_start, re-noises and denoises its own estimate at the levels of
    PASS_SIGMAS, and each shell then adds its octave once, from pure noise in its high band. Training passes
    `start` [N,3,r,r], real images with noise. Gradients flow through the last core pass and the shells."""
    pyramid = pyramid_levels(denoiser)
    core = pyramid[0]
    assert isinstance(core, CoreDenoiser)
    if start is None:
        start = (sigma_start**2 + SIGMA_DATA**2) ** 0.5 * draw("start", core.resolution)
    x = start
    schedule = (sigma_start, *PASS_SIGMAS[passes])
    for i, sigma in enumerate(schedule):
        s = torch.full((len(x),), sigma, device=x.device)
        last = i + 1 == len(schedule)
        with torch.set_grad_enabled(torch.is_grad_enabled() and last):
            estimate = core.estimate(x, s, text)
        if not last:
            x = estimate.denoised + schedule[i + 1] * draw(f"pass-{i + 1}", core.resolution)
    made = [estimate.denoised]
    for shell in pyramid[1:]:
        assert isinstance(shell, ShellDenoiser)
        sigma = 8 * shell.sigma_high_band
        noisy = lift(estimate.denoised.detach(), sigma, draw(f"shell-{shell.resolution}", shell.resolution))
        s = torch.full((len(x),), sigma, device=x.device)
        estimate = shell.add_octave(noisy, estimate, s, text)
        made.append(estimate.denoised)
    return made


@torch.no_grad()
def generate(
    snapshot: Snapshot,
    text: Text,
    seeds: Sequence[int],
    num_steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 64,
    sampler: str | None = None,
    guide: str | None = None,
) -> Generated:
    """Make one image a caption and seed, with the snapshot's own defaults.

    `num_steps` is the number of passes of a refined model (one of its `passes`), else of steps of `sampler`
    (one of SAMPLERS, or ADAPTIVE), guided by `guide` (one of GUIDES). Raises ConfigError where the snapshot
    lacks the weights of its guide, or was not trained or set for its sampler. The snapshot says whether tiles are
    finished early (`finish`), once their predicted error is half a grey level."""
    config = snapshot.config
    # Older snapshots do not name these.
    sampling = {"sampler": "heun", "guide": "no_text", "finish": False, **config["sampling"]}
    guide = guide or sampling["guide"]
    if guide == "early" and snapshot.early is None and config["kind"] != "refined":
        fix = "choose another, or train with pretrain.early_images and finetune.early_images"
        raise ConfigError("E-CFG-047", "guide", "'early' needs weights that this model does not have", fix)
    sampler = sampler or sampling["sampler"]
    if sampler == ADAPTIVE and snapshot.denoiser.difficulty is None and config["kind"] != "refined":
        fix = "choose another, or train with regions.probability above 0"
        raise ConfigError(
            "E-CFG-048", "sampler", "'adaptive' needs a model that was trained with regions", fix
        )
    if sampler == ADAPTIVE and guide != "no_text" and config["kind"] != "refined":
        problem = f"{guide!r} cannot guide the adaptive sampler"
        raise ConfigError("E-CFG-049", "guide", problem, "choose no_text, or another sampler")
    if sampler == ADAPTIVE and sampling["finish"] and config["kind"] != "refined":
        problem = "'adaptive' cannot finish tiles early, as this model's sampling.finish asks"
        raise ConfigError("E-CFG-053", "sampler", problem, "choose another sampler")
    device = next(snapshot.denoiser.parameters()).device
    finish = Finish(HALF_A_GREY_LEVEL / max(snapshot.statistics.std)) if sampling["finish"] else None
    images, nfe = [], 0
    for i in range(0, len(seeds), batch_size):
        rows, part = seeds[i : i + batch_size], text.select(slice(i, i + batch_size)).to(device)
        if config["kind"] == "refined":
            passes = num_steps or min(config["passes"])
            draw = noise_like_seeds(rows, device)
            x = few_step(snapshot.denoiser, part, draw, passes, config["sigma_start"])[-1]
            nfe = passes
        else:
            x, nfe = sample_pyramid(
                snapshot.denoiser,
                part,
                rows,
                num_steps or sampling["num_steps"],
                sampling["guidance"] if guidance is None else guidance,
                tuple(sampling["guidance_interval"]),
                sampling["lift"],
                sampler=sampler,
                guide=guide,
                early=snapshot.early,
                finish=finish,
            )
        images.append(snapshot.statistics.to_uint8(x).cpu())
    return Generated(torch.cat(images), nfe, finish.share if finish else 1.0)
