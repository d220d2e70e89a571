"""Noise levels by region: maps of one level change no bit, other maps do what the equations say."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.adaptive import region_denoiser, sde_dpmpp_2m_adaptive
from pipeline.diffusion.loss import denoising_loss
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.diffusion.regions import region_sigma
from pipeline.diffusion.samplers import ADAPTIVE, sde_dpmpp_2m
from pipeline.models.conditioning import region_features, split_level
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import Denoiser, build_core, build_shell
from pipeline.models.layers import renormalize_
from pipeline.models.resample import pool
from pipeline.models.shape import SQUARE, Shape
from tests.builders import SHELL, captions, perturb

NET = {"patch": 1, "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention": [8], "dropout": 0.0}


def random_denoiser(seed: int, shell: bool, kernels: str = "off", regions: bool = True) -> Denoiser:
    """Random weights everywhere, zero gains included."""
    torch.manual_seed(seed)
    more = {"regions": regions, "kernels": kernels}
    model: Denoiser = build_core(32, 8, {**NET, **more})
    if shell:
        model = build_shell(model, 8, 0.04, {**SHELL, **more})
    return perturb(model, 0.5)


def field(sigma: torch.Tensor, grid: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return sigma[:, None, None, None].expand(-1, 1, *grid).contiguous()


@pytest.mark.parametrize("kernels", ["off", "both"])
@pytest.mark.parametrize("shell", [False, True])
@pytest.mark.parametrize(("seed", "grid"), [(0, (8, 8)), (1, (12, 4)), (2, (6, 10))])
def test_a_map_of_one_level_gives_the_bits_of_that_level_for_any_weights(
    seed: int, grid: tuple[int, int], shell: bool, kernels: str
) -> None:
    model = random_denoiser(seed, shell, kernels)
    g = torch.Generator().manual_seed(seed)
    sigma = (2 * torch.randn(5, generator=g)).exp()
    size = [side * model.resolution // 8 for side in grid]
    x = torch.randn(5, 3, *size, generator=g) * sigma[:, None, None, None]
    with torch.no_grad():
        plain, mapped = (model.estimate(x, s, captions(5)) for s in (sigma, field(sigma, grid)))
    assert torch.equal(plain.denoised, mapped.denoised) and torch.equal(plain.features, mapped.features)
    if kernels == "off":  # and those of a network that knows nothing of regions
        ignorant = random_denoiser(seed, shell, regions=False)
        ignorant.load_state_dict({k: v for k, v in model.state_dict().items() if k in ignorant.state_dict()})
        with torch.no_grad():
            assert torch.equal(ignorant(x, sigma, captions(5)), mapped.denoised)


def test_the_levels_of_a_map_split_exactly() -> None:
    sigma = torch.tensor([0.0371, 7.3, 80.0])
    c_noise, regions = split_level(field(sigma))
    assert torch.equal(c_noise, sigma.log() / 4) and regions is not None and not regions.any()
    steps = field(torch.ones(1))
    steps[..., :4] = math.exp(2)
    c_noise, regions = split_level(steps)
    assert float(c_noise) == pytest.approx(1 / 4)
    assert regions is not None
    assert regions[0, :, 0, 0].tolist() == pytest.approx(
        [math.sin(2**k * math.pi / 8) for k in range(4)], abs=1e-6
    )
    torch.testing.assert_close(regions[..., 4:], -regions[..., :4])
    assert torch.equal(
        region_features(torch.full((1, 1, 1, 1), 9.0)), region_features(4 * torch.ones(1, 1, 1, 1))
    )


@pytest.mark.parametrize("shell", [False, True])
def test_other_maps_matter_and_a_shell_keeps_the_estimate_below(shell: bool) -> None:
    model = random_denoiser(3, shell)
    sigma = field(torch.ones(2))
    sigma[:, :, :4] = 0.1
    x = torch.randn(2, 3, model.resolution, model.resolution)
    with torch.no_grad():
        denoised = model(x, sigma, captions(2))
        assert not torch.allclose(denoised, model(x, field(torch.full((2,), 0.5)), captions(2)), atol=1e-2)
        if shell:
            below = model.below(pool(x), sigma / 2, captions(2))
            torch.testing.assert_close(pool(denoised), below, atol=1e-5, rtol=1e-4)


def test_an_untrained_core_is_the_exact_denoiser_of_gaussian_data_under_any_map() -> None:
    core = build_core(32, 8, {**NET, "regions": True})
    sigma = field(torch.ones(1)) * torch.linspace(0.1, 8, 64).view(1, 1, 8, 8)
    x = torch.randn(1, 3, 32, 32)
    per_pixel = torch.kron(sigma[0, 0], torch.ones(4, 4))
    torch.testing.assert_close(core(x, sigma, captions(1)), x * 0.25 / (0.25 + per_pixel**2))


@pytest.mark.parametrize("shell", [False, True])
def test_the_loss_of_a_map_of_one_level_is_that_of_the_image(shell: bool) -> None:
    model = random_denoiser(4, shell)
    g = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(3, 3, model.resolution, model.resolution, generator=g) for _ in range(2))
    sigma = torch.tensor([0.2, 1.0, 5.0])
    loss, error = denoising_loss(model, images, sigma, noise, captions(3))
    by_patch, patch_error = denoising_loss(model, images, field(sigma), noise, captions(3))
    assert by_patch.shape == patch_error.shape == (3, 1, 8, 8)
    torch.testing.assert_close(patch_error.mean(dim=(1, 2, 3)), error)
    difficulty = model.difficulty
    assert difficulty is not None
    by_patch.mean().backward()
    assert difficulty.gain.grad is not None and float(difficulty.gain.grad.abs()) > 0
    loss.mean().backward()


def test_the_difficulty_head_learns_the_log_of_the_error() -> None:
    model = build_core(32, 8, {**NET, "regions": True})
    head = model.difficulty
    assert head is not None
    features = torch.zeros(1, 16, 8, 8)
    features[:, 0, :4], features[:, 0, 4:] = 4.0, -4.0
    error = torch.ones(1, 1, 8, 8)
    error[:, :, 4:] = math.exp(-2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(200):
        h = head(features, torch.full((1, 1, 8, 8), -1.0))
        optimizer.zero_grad()
        (error / h.exp() + h).mean().backward()
        optimizer.step()
        renormalize_(head.conv.weight.data)
    torch.testing.assert_close(h.exp(), error, rtol=0.1, atol=0)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_maps_do_not_depend_on_anything_but_the_generator_and_keep_the_mean_level(
    grid: tuple[int, int],
) -> None:
    sigma = torch.full((20000,), 0.5)
    maps = region_sigma(sigma, grid, 0.5, torch.Generator().manual_seed(0), 80.0)
    assert maps.shape == (20000, 1, *grid)
    assert torch.equal(maps, region_sigma(sigma, grid, 0.5, torch.Generator().manual_seed(0), 80.0))
    uniform = (maps == 0.5).flatten(1).all(dim=1)
    assert float(uniform.float().mean()) == pytest.approx(0.5, abs=0.02)
    mixed = (maps[~uniform] / 0.5).log()
    assert float(mixed.mean()) == pytest.approx(0, abs=0.01)  # the mean level is that of uniform training
    lowest = mixed.flatten(1).amin(dim=1)
    assert (
        float(lowest.min()) >= -0.8 * 1.5 - 1e-5
    )  # the cleanest patch: no patch lies below ln sigma - 0.8 w
    assert float(mixed.std()) == pytest.approx(0.39, abs=0.02)
    clipped = region_sigma(sigma, grid, 1.0, torch.Generator().manual_seed(1), 0.6, finished=0.2)
    assert float(clipped.max()) == pytest.approx(0.6) and float(clipped.min()) == pytest.approx(0.002)
    assert float((clipped < 0.0021).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_square_maps_keep_the_numbers_they_had_before_others_came() -> None:
    sigma = torch.linspace(0.1, 9, 64)
    maps = region_sigma(sigma, (8, 8), 0.7, torch.Generator().manual_seed(3), 20.0, finished=0.2)
    assert float(maps.double().mean()) == pytest.approx(4.027535377896015, rel=1e-6)
    first = [0.05029427632689476, 0.05752011761069298, 0.05957674980163574, 0.07228205353021622]
    assert maps[0, 0, 0, :4].tolist() == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_without_leads_the_adaptive_sampler_is_the_plain_one_bit_for_bit(steps: int) -> None:
    model = random_denoiser(5, shell=False)
    g = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 3, 32, 32, generator=g) for _ in range(2))
    sigmas = karras_sigmas(steps, 80.0, 0.002)

    def draw(i: int) -> Tensor:
        return noise.roll(i, dims=-1)

    with torch.no_grad():
        plain = sde_dpmpp_2m(model, 80 * x, sigmas, captions(2), draw)
        estimate = region_denoiser(model, captions(2))
        adaptive = sde_dpmpp_2m_adaptive(estimate, 80 * x, sigmas, draw, patch=4, delta=0.0)
        assert torch.equal(plain, adaptive)
        if steps > 2:
            led = sde_dpmpp_2m_adaptive(estimate, 80 * x, sigmas, draw, patch=4)
            assert torch.isfinite(led).all() and not torch.equal(plain, led)


def test_guidance_by_region_is_plain_outside_of_its_interval() -> None:
    model = random_denoiser(6, shell=True)
    sigma = field(torch.ones(1))
    sigma[:, :, :4] = 20.0  # as the core sees it: 0.5 below, 10 above
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain, _ = region_denoiser(model, captions(1))(x, sigma)
        guided, _ = region_denoiser(model, captions(1), 3.0, (0.3, 5.0))(x, sigma)
        nothing = model(x, sigma, captions(1).drop_captions())
    torch.testing.assert_close(guided[:, :, :32], plain[:, :, :32])
    torch.testing.assert_close(guided[:, :, 32:], (nothing + 3 * (plain - nothing))[:, :, 32:])


@pytest.mark.parametrize("shape", [SQUARE, Shape(0.75, 1.25)])
def test_the_pyramid_is_sampled_with_levels_that_differ_on_its_finest_level(shape: Shape) -> None:
    model = random_denoiser(4, shell=True)
    calls: list[int] = []
    hook = model.net.register_forward_hook(lambda *_: calls.append(1))
    settings = SamplerSettings(12, ADAPTIVE, guidance_interval=(0.3, 5.0))
    images, nfe = sample_pyramid(model, captions(2), [0, 1], settings, shape=shape)
    hook.remove()
    assert images.shape == (2, 3, *shape.at(64)) and torch.isfinite(images).all()
    assert nfe == 12 > len(calls) > 0
    again, _ = sample_pyramid(model, captions(2), [0, 1], settings, shape=shape)
    assert torch.equal(images, again)
    settings = replace(settings, sampler="sde_dpmpp_2m")
    plain, _ = sample_pyramid(model, captions(2), [0, 1], settings, shape=shape)
    assert not torch.allclose(images, plain, atol=1e-3)
    settings = SamplerSettings(12, ADAPTIVE, guidance=1.5, guidance_interval=(0.3, 5.0))
    _, guided = sample_pyramid(model, captions(2), [0, 1], settings, shape=shape)
    assert guided > nfe
