"""Maps of noise levels that follow the image: by a bridge they leave the denoiser exact, in other ways they do not.

A mixture of three Gaussians of 4x4 px, with known variances, whose components have their detail in different
patches of 2x2 px, so that a map that follows the clean image tells the component. Where a map may be ignored, the
error of the exact denoiser for maps drawn without images correlates with nothing that can be seen, map included.
"""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pipeline.diffusion.noise import lognormal_sigma
from pipeline.diffusion.regions import arrange, bridge_maps, bridge_noise, detail, region_sigma
from pipeline.models.resample import resize

N, GRID, SIDE = 40_000, (2, 2), 4
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
_G = torch.Generator().manual_seed(0)
MEANS = torch.randn(3, SIDE**2, generator=_G)
VARIANCES = (torch.randn(3, SIDE**2, generator=_G) - 2).exp()  # of each component and pixel


def exact(z: Tensor, sigma: Tensor) -> Tensor:
    """E[x | z] of [N,1,4,4] at levels [N] or [N,1,2,2] that were drawn without images."""
    s = sigma[:, None, None, None].expand_as(z) if sigma.ndim == 1 else resize(sigma, SIDE)
    z, s = z.flatten(1)[:, None], s.flatten(1)[:, None]
    total = VARIANCES + s**2
    shares = (WEIGHTS.log() - 0.5 * ((z - MEANS) ** 2 / total + total.log()).sum(-1)).softmax(1)
    means = MEANS + VARIANCES / total * (z - MEANS)
    return (shares[..., None] * means).sum(1).view(-1, 1, SIDE, SIDE)


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Images, levels and noise, and a generator for more."""
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, N, replacement=True, generator=g)
    x = MEANS[k] + VARIANCES[k].sqrt() * torch.randn(N, SIDE**2, generator=g)
    sigma = region_sigma(lognormal_sigma(N, 0.0, 1.0, g), GRID, 1.0, g, sigma_max=20.0)
    return x.view(-1, 1, SIDE, SIDE), sigma, torch.randn(N, 1, SIDE, SIDE, generator=g), g


def leak(x: Tensor, sigma: Tensor, noise: Tensor) -> float:
    """The greatest t-value of the exact denoiser's error against functions of z and the map, over all pixels."""
    s = resize(sigma, SIDE)
    z = x + s * noise
    denoised = exact(z, sigma)
    relative = (s / s.mean(dim=(1, 2, 3), keepdim=True)).log()
    seen = [torch.ones_like(z), relative, denoised, denoised * relative, z / s, z * relative / s]
    products = torch.stack([(x - denoised) * f for f in seen])
    t = products.mean(dim=1) / products.std(dim=1) * math.sqrt(N)
    return float(t.abs().max())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bridge_leaves_the_denoiser_of_plain_maps_exact(seed: int) -> None:
    x, sigma, noise, g = drawn(seed)
    assert leak(x, sigma, noise) < 4.5
    maps, led = bridge_maps(exact, x, sigma, noise, g)
    assert leak(x, maps, led) < 4.5
    assert torch.equal(maps.flatten(1).sort().values, sigma.flatten(1).sort().values)
    agreement = stats.spearmanr(detail(x, GRID).flatten(), (maps / sigma.mean((2, 3), True)).flatten())
    assert agreement.statistic > 0.2  # maps do follow the image


def test_maps_of_the_clean_image_do_not() -> None:
    x, sigma, noise, _ = drawn(0)
    assert leak(x, arrange(sigma, detail(x, GRID)), noise) > 20


def test_nor_do_maps_of_the_estimate_with_fresh_noise() -> None:
    x, sigma, noise, g = drawn(0)
    maps, _ = bridge_maps(exact, x, sigma, noise, g)
    assert leak(x, maps, torch.randn(noise.shape, generator=g)) > 6


def test_the_noise_of_a_bridge_is_white_and_that_above_adds_to_it() -> None:
    g = torch.Generator().manual_seed(0)
    sigma = torch.tensor([[1e-4, 0.3], [1.0, 2.0]]).expand(N, 1, 2, 2)
    noise = torch.randn(N, 1, 2, 2, generator=g)
    led = bridge_noise(sigma, noise, g)
    added = 2.0 * noise - sigma * led  # from z at the map to z at its highest level
    both = torch.cat([led.flatten(1), added.flatten(1)], dim=1).T
    expected = torch.diag(torch.cat([torch.ones(4), (4 - sigma[0].flatten() ** 2)]))
    torch.testing.assert_close(torch.cov(both), expected, atol=0.08, rtol=0)
    assert torch.equal(led[:, :, 1, 1], noise[:, :, 1, 1])  # the highest level has its noise already
    assert stats.kstest(led.flatten().numpy(), "norm").pvalue > 0.01


def test_a_map_of_one_level_keeps_its_noise_and_close_levels_nearly_all_of_it() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 8, 8, generator=g)
    assert torch.equal(bridge_noise(torch.full((1, 1, 2, 2), 0.37), noise, g), noise)
    sigma = torch.full((1, 1, 2, 2), 1.0)
    sigma[..., 0] -= 2**-24  # the float32 below 1
    change = (bridge_noise(sigma, noise, g) - noise)[..., :4]
    assert float(change.std()) == pytest.approx(2**-11.5, rel=0.3)  # sqrt(1 - r^2)


def test_arranged_maps_keep_their_levels_and_follow_the_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = region_sigma(torch.tensor([0.5, 2.0]), (4, 4), 1.0, generator, 80.0)
    energy = torch.rand(2, 1, 4, 4, generator=generator)
    arranged = arrange(sigma, energy)
    assert torch.equal(arranged.flatten(1).sort().values, sigma.flatten(1).sort().values)
    assert all(
        stats.spearmanr(a.numpy(), b.numpy()).statistic == pytest.approx(1)
        for a, b in zip(arranged.flatten(1), energy.flatten(1), strict=True)
    )


def test_detail_is_that_of_each_patch() -> None:
    images = torch.zeros(1, 3, 12, 16)
    images[:, :, :4, 4:8] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    expected = torch.zeros(1, 1, 3, 4)
    expected[0, 0, 0, 1] = 1.0
    assert torch.equal(detail(images, (3, 4)), expected)
