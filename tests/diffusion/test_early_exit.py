"""Tiles that are finished: when, that they stay, and that the others are computed as if nothing had left."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.diffusion import generate, pyramid
from pipeline.diffusion.early_exit import ActiveTiles, TileEarlyExit, predicted_error
from pipeline.diffusion.guidance import Denoise
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.samplers import ADAPTIVE, SAMPLERS, integrate
from pipeline.errors import ConfigError
from pipeline.models import tiles
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import ShellDenoiser, build_core, build_shell
from pipeline.models.resample import pool
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from pipeline.models.tiles import tiling
from tests.builders import captions, snapshot_config

TILE = 16


@pytest.fixture(scope="module")
def shell() -> ShellDenoiser:
    """128 px, with windows of 56; random weights, and estimates that settle at different times."""
    torch.manual_seed(0)
    core = build_core(64, 8, {"patch": 2, "channels": 8, "channel_mult": [1], "attention": []})
    made = build_shell(core, 8, 0.04, {"patch": 1, "channels": 8, "num_blocks": 1})
    with torch.no_grad():
        for name, p in made.named_parameters():
            p += 0.3 * torch.randn(p.shape)
            if name.endswith("out_gain"):
                p.fill_(0.2)
    assert tiling(made, (128, 128), TILE).window == 56
    return made.requires_grad_(False)


class Reference:
    """Whole images at every call; what is finished is masked. Written from the rule, without tiles."""

    def __init__(
        self, shell: ShellDenoiser, num_images: int, size: Sequence[int], early_exit: TileEarlyExit
    ) -> None:
        self.shell, self.early_exit = shell, early_exit
        self.open = torch.ones(num_images, 1, size[0] // TILE, size[1] // TILE, dtype=torch.bool)

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        return self.shell(noisy, sigma, text)

    def with_exit(self, guided: Denoise) -> Denoise:
        seen: list[tuple[Tensor, Tensor]] = []

        def rms(x: Tensor) -> Tensor:
            return F.avg_pool2d(x.square().mean(dim=1, keepdim=True), TILE).sqrt()

        def denoise(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
            denoised = guided(noisy, sigma, text)
            if seen:
                z, kept = seen[-1]
                pixels = self.open.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)
                denoised = torch.where(pixels, denoised, kept)
                slope = rms(denoised - kept) / rms(noisy - z)
                self.open = self.open & (
                    sigma[:, None, None, None] * slope.sqrt() >= self.early_exit.tolerance
                )
            seen.append((noisy, denoised))
            return denoised

        return denoise


def made_by(
    shell: ShellDenoiser, early_exit: TileEarlyExit | None, n: int = 2, **options: Any
) -> tuple[Tensor, int]:
    settings = SamplerSettings(12, guidance=1.5, guidance_interval=(0.3, 5.0), handover=(30.0,))
    text = captions(2).select(slice(n))
    return sample_pyramid(shell, text, range(n), replace(settings, **options), early_exit=early_exit)


def tolerance_for(shell: ShellDenoiser, monkeypatch: pytest.MonkeyPatch, **options: object) -> float:
    """What a few tiles miss at first."""
    errors: list[Tensor] = []

    def watch(*args: object) -> Tensor:
        errors.append(predicted_error(*args))
        return errors[-1]

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.diffusion.early_exit.predicted_error", watch)
        made_by(shell, TileEarlyExit(0.0, TILE), **options)
    return float(errors[0].quantile(0.97))


@pytest.mark.parametrize("guide", ["unconditional", "low_band"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_equals_that_of_whole_images_with_a_mask(
    shell: ShellDenoiser, sampler: str, guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sampler": sampler, "guide": guide}
    tolerance, ran = tolerance_for(shell, monkeypatch, **options), 0

    def counted(*args: object) -> object:
        nonlocal ran
        ran += len(args[-1].rows)
        return tiles.tile_octave(*args)

    monkeypatch.setattr("pipeline.diffusion.early_exit.tile_octave", counted)
    early_exit = TileEarlyExit(tolerance, TILE)
    picture, nfe = made_by(shell, early_exit, **options)
    monkeypatch.setattr(pyramid, "ActiveTiles", Reference)
    reference, same = made_by(shell, TileEarlyExit(tolerance, TILE), **options)
    torch.testing.assert_close(picture, reference, atol=1e-5, rtol=1e-5)
    assert (
        nfe == same and 0 < early_exit.compute_fraction < 1 and ran > 0
    )  # by tiles at times, and whole at others
    plain, _ = made_by(shell, None, **options)
    assert not torch.allclose(picture, plain, atol=1e-4)


def test_nothing_finished_gives_the_bits_of_the_plain_sampler(shell: ShellDenoiser) -> None:
    early_exit = TileEarlyExit(0.0, TILE)
    picture, nfe = made_by(shell, early_exit)
    plain, calls = made_by(shell, None)
    assert torch.equal(picture, plain) and nfe == calls and early_exit.compute_fraction == 1


def test_a_picture_does_not_depend_on_what_is_finished_beside_it(
    shell: ShellDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = tolerance_for(shell, monkeypatch, sampler="dpmpp_2m")
    together, _ = made_by(shell, TileEarlyExit(tolerance, TILE), n=2, sampler="dpmpp_2m")
    alone, _ = made_by(shell, TileEarlyExit(tolerance, TILE), n=1, sampler="dpmpp_2m")
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_finished_tile_keeps_its_estimate_and_costs_nothing(shell: ShellDenoiser) -> None:
    early_exit = TileEarlyExit(math.inf, TILE)  # after the second call everything is
    opened = ActiveTiles(shell, 1, (128, 128), early_exit)
    denoise = opened.with_exit(opened)
    g = torch.Generator().manual_seed(0)
    z = [torch.randn(1, 3, 128, 128, generator=g) for _ in range(4)]
    calls: list[int] = []
    hook = shell.net.register_forward_hook(lambda *_: calls.append(1))
    found = [
        denoise(x, torch.full((1,), s), captions(1)) for x, s in zip(z, (0.5, 0.4, 0.3, 0.2), strict=True)
    ]
    hook.remove()
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2]) and torch.equal(found[2], found[3])
    assert len(calls) == 2 and early_exit.compute_fraction == 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_predicted_error_is_that_of_exact_denoisers(sampler: str) -> None:
    """Gaussian data, of another standard deviation in each tile: the error of the best estimate is known."""
    std = torch.tensor([0.5, 0.1, 0.02, 0.004])
    field = std.view(1, 1, 2, 2).repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)
    g = torch.Generator().manual_seed(1)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def exact(noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        denoised = noisy * (field**2 / (field**2 + sigma[:, None, None, None] ** 2))
        seen.append((noisy, denoised, sigma))
        return denoised

    sigmas = karras_sigmas(32, 1.0, 0.002)
    start = field * torch.randn(1, 3, 32, 32, generator=g) + torch.randn(1, 3, 32, 32, generator=g)

    def draw(_):
        return torch.randn(1, 3, 32, 32, generator=g)

    integrate(sampler, exact, start, sigmas, captions(1), draw)
    for (z0, d0, s0), (z1, d1, s1) in pairwise(seen):
        if s0 == s1:  # Heun's second estimate at a level, from which it hardly moves
            continue
        error = predicted_error(z1 - z0, d1 - d0, s1, TILE)[0]
        true = std * s1 / (std**2 + s1**2).sqrt()
        assert (error > 0.8 * true).all() and (error < 2.5 * true).all()


def test_a_tile_is_finished_at_half_a_grey_level() -> None:
    """The tolerance of `generate`, in grey levels of the channel that varies most."""
    statistics = Statistics((0.0, 0.0, 0.0), (0.3, 0.6, 0.5))
    tolerance = generate.HALF_A_GREY_LEVEL / max(statistics.std)
    grey = torch.full((1, 3, 1, 1), 100.0)
    step = statistics.standardise(grey + 0.5) - statistics.standardise(grey)
    assert float(step.min()) == pytest.approx(tolerance, rel=1e-3)


@pytest.mark.parametrize(("early_exit", "fraction"), [(False, 1.0), (True, 1 / 2)])
def test_the_snapshot_says_whether_tiles_are_finished(
    shell: ShellDenoiser, early_exit: bool, fraction: float
) -> None:
    """Of pictures that hardly vary, half a grey level is much: all is finished at the second of four calls."""
    sampling = SamplerSettings(6, "dpmpp_2m", handover=(1000.0,), early_exit=early_exit)
    statistics = Statistics((0.0,) * 3, (1e-5,) * 3)
    snapshot = Snapshot(shell, snapshot_config(shell, sampling=sampling, statistics=statistics), "")
    made = generate.generate(snapshot, captions(2), [0, 1])
    assert made.nfe == 6 and made.compute_fraction == pytest.approx(fraction)


def test_the_adaptive_sampler_is_refused_where_tiles_are_to_be_finished() -> None:
    net = {"patch": 2, "channels": 8, "channel_mult": [1], "attention": [], "regions": True}
    shell = build_shell(build_core(16, 8, net), 8, 0.04, {"patch": 2, "channels": 8, "regions": True})

    def made(early_exit: bool) -> generate.Generated:
        snapshot = Snapshot(shell.eval(), snapshot_config(shell), "")
        return generate.generate(
            snapshot, captions(1), [0], SamplerSettings(4, ADAPTIVE, early_exit=early_exit)
        )

    assert made(early_exit=False).nfe == 4
    with pytest.raises(ConfigError, match="sampler: 'adaptive' has no early exit"):
        made(early_exit=True)


def test_the_level_below_sees_the_noise_that_it_is_told_of(
    shell: ShellDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tiles are finished, too: their state goes on towards their estimate, with noise."""
    pooled: list[tuple[Tensor, Tensor]] = []
    estimate = shell.below.estimate

    def watch(noisy: Tensor, sigma: Tensor, text: Conditioning) -> object:
        pooled.append((noisy, sigma))
        return estimate(noisy, sigma, text)

    monkeypatch.setattr(shell.below, "estimate", watch)
    opened = ActiveTiles(shell, 1, (128, 128), TileEarlyExit(math.inf, TILE))
    g = torch.Generator().manual_seed(2)

    def draw(_):
        return torch.randn(1, 3, 128, 128, generator=g)

    sigmas = torch.cat([torch.logspace(-0.3, -1.7, 12, dtype=torch.float64), torch.zeros(1).double()])
    end = integrate("sde_dpmpp_2m", opened.with_exit(opened), 0.5 * draw(0), sigmas, captions(1), draw)
    assert len(pooled) == 12
    for noisy, sigma in pooled[9:]:  # all of it finished at the second call, and what was before has faded
        assert float((noisy - pool(end)).std()) == pytest.approx(float(sigma), rel=0.05)
