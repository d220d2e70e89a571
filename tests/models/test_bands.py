"""The low band's own clock: levels that agree change no bit, others are told to the shell and learned."""

import math

import pytest
import torch

from pipeline.diffusion.loss import denoising_loss
from pipeline.diffusion.noise import LOW_SIGMAS, LowBand, draw_low_band
from pipeline.models.conditioning import band_features
from pipeline.models.denoiser import ShellDenoiser, build_core, build_shell
from pipeline.models.resample import high_pass, pool
from tests.builders import SHELL, captions, perturb

NET = {"patch": 1, "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention": [8], "dropout": 0.0}


def shell(seed: int, spread: float = 0.5, **more: bool) -> ShellDenoiser:
    """Two shells around a core, with random weights everywhere, zero gains included."""
    torch.manual_seed(seed)
    below = build_shell(build_core(16, 8, {**NET, **more}), 8, 0.09, {**SHELL, **more})
    return perturb(build_shell(below, 8, 0.04, {**SHELL, **more, "bands": True}), spread)


def field(sigma: torch.Tensor) -> torch.Tensor:
    return sigma[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_level_that_pooling_gives_changes_no_bit_for_any_weights(seed: int) -> None:
    model = shell(seed)
    g = torch.Generator().manual_seed(seed)
    sigma = (2 * torch.randn(5, generator=g)).exp()
    x = torch.randn(5, 3, 64, 64, generator=g)
    plain = build_shell(model.below, 8, 0.04, SHELL)  # and knows nothing of bands
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "band_" not in k})
    with torch.no_grad():
        told, untold = model.estimate(x, sigma, captions(5), sigma / 2), model.estimate(x, sigma, captions(5))
        ignorant = plain.estimate(x, sigma, captions(5))
    for other in (untold, ignorant):
        assert torch.equal(told.denoised, other.denoised) and torch.equal(told.features, other.features)


def test_maps_of_one_level_do_what_that_level_does() -> None:
    model = shell(3, regions=True)
    sigma, low = torch.tensor([0.3, 2.0]), torch.tensor([0.05, 0.2])
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.estimate(x, sigma, captions(2), low).denoised
        mapped = model.estimate(x, field(sigma), captions(2), field(low)).denoised
    torch.testing.assert_close(whole, mapped)


def test_the_shell_is_told_how_far_the_levels_are_apart() -> None:
    sigma, low = torch.tensor([0.1, 1.0, 1e-5]), torch.tensor([0.05, 0.05, 0.5])
    phi = band_features(sigma, low)
    assert phi.shape == (3, 4, 1, 1) and not phi[0].any()
    b = math.log(0.1)
    expected = [math.sin(2**k * math.pi * b / 12) for k in range(4)]
    assert phi[1].flatten().tolist() == pytest.approx(expected, abs=1e-6)
    far = [math.sin(2**k * math.pi / 2) for k in range(4)]  # clipped to 6
    assert phi[2].flatten().tolist() == pytest.approx(far, abs=1e-5)


def test_a_low_band_of_its_own_level_reaches_the_network_below_as_it_is() -> None:
    model = shell(4)
    sigma, low = torch.full((2,), 1.5), torch.full((2,), 0.05)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoised = model.estimate(x, sigma, captions(2), low).denoised
        torch.testing.assert_close(
            pool(denoised), model.below(pool(x), low, captions(2)), atol=1e-5, rtol=1e-4
        )
        untold = model.estimate(x, sigma, captions(2)).denoised
        assert not torch.allclose(high_pass(denoised), high_pass(untold), atol=1e-2)


def test_the_loss_of_agreeing_levels_is_the_plain_one() -> None:
    model = shell(5)
    g = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(3, 3, 64, 64, generator=g) for _ in range(2))
    sigma = torch.tensor([0.2, 1.0, 5.0])
    plain = denoising_loss(model, images, sigma, noise, captions(3))
    banded = denoising_loss(model, images, sigma, noise, captions(3), LowBand(pool(images), sigma / 2))
    for a, b in zip(plain, banded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def pictures(g: torch.Generator) -> torch.Tensor:
    """Vertical bars, finer than the low band can show: their phase is in the low band's colour."""
    phase = torch.rand(8, 1, 1, 1, generator=g) < 0.5
    bars = torch.where(torch.arange(16) % 2 == 0, 0.3, -0.3).expand(8, 3, 16, 16)
    return torch.where(phase, bars + 0.4, -bars - 0.4)


def test_levels_apart_are_learned_by_way_of_the_band_layers() -> None:
    torch.manual_seed(0)
    core = build_core(8, 8, {**NET, "channels": 8, "channel_mult": [1], "attention": []}).requires_grad_(
        False
    )
    model = build_shell(core, 8, 0.12, {**SHELL, "bands": True})
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=0.03)
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(40):
        images = pictures(g)
        sigma = (torch.rand(8, generator=g) + 1) * 1.5
        noise = torch.randn(images.shape, generator=g)
        low = LowBand(pool(images), torch.full((8,), 0.05))
        loss, error = denoising_loss(model, images, sigma, noise, captions(8), low)
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
        losses.append(float(error.mean()))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    learned = {name: p for name, p in model.net.named_parameters() if "band_" in name}
    assert len(learned) == 2 * 6  # conv and gain: after the first convolution, and in each of 5 blocks
    for name, p in learned.items():
        assert p.grad is not None and float(p.grad.abs().sum()) > 0, name
        assert not name.endswith("gain") or float(p.detach().abs()) > 1e-4, name


def test_low_bands_are_drawn_for_a_share_of_images_and_only_these_are_degraded() -> None:
    images = torch.randn(4000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((4000,), 0.4)
    asked = []

    def degrade(low: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        asked.append(len(low))
        return low + 100

    low = draw_low_band(images, sigma, 0.25, torch.Generator().manual_seed(1), degrade)
    own = low.sigma != 0.2
    assert float(own.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert LOW_SIGMAS[0] <= float(low.sigma[own].min()) and float(low.sigma[own].max()) <= LOW_SIGMAS[1]
    middle = math.sqrt(LOW_SIGMAS[0] * LOW_SIGMAS[1])
    assert float((low.sigma[own] < middle).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert asked == [int(own.sum())]
    assert torch.equal(low.images[own], pool(images)[own] + 100)
    assert torch.equal(low.images[~own], pool(images)[~own])
    by_patch = draw_low_band(
        images, sigma.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), 0.25, torch.Generator().manual_seed(1)
    )
    assert torch.equal(by_patch.sigma[:, 0, 1, 1], low.sigma)
