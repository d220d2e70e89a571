"""Tiles of a shell are those of the whole pass, and a loss on some of them is, on average, that on all."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.dataset import Batch
from pipeline.diffusion.loss import denoising_loss, tiled_loss
from pipeline.diffusion.noise import LowBand
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import ShellDenoiser, build_core, build_shell
from pipeline.models.resample import pool
from pipeline.models.statistics import Statistics
from pipeline.models.tiles import (
    MIN_PROBABILITY,
    Tiling,
    coarsest_px,
    draw_tiles,
    receptive_radius,
    tile_octave,
    tile_probabilities,
    tiling,
    trained_tiles,
)
from pipeline.training.denoising import DenoisingSettings, DenoisingStep
from tests.builders import captions, perturb

SHAPES = [  # patch of the shell and of the level below, blocks, kernels
    (1, 1, 1, "off"),
    (1, 2, 2, "off"),
    (2, 1, 1, "off"),
    (4, 1, 1, "off"),
    (1, 4, 1, "off"),
    (1, 1, 1, "both"),
    (2, 1, 1, "content"),
]


def shell_of(
    patch: int = 1,
    below: int = 1,
    blocks: int = 1,
    kernels: str = "off",
    regions: bool = False,
    bands: bool = False,
    resolution: int = 128,
) -> ShellDenoiser:
    """Random weights everywhere, zero gains included."""
    torch.manual_seed(patch + 10 * below)
    net = {"patch": below, "channels": 8, "channel_mult": [1], "attention": [], "regions": regions}
    core = build_core(resolution // 2, 8, net)
    shape: dict[str, Any] = {"patch": patch, "channels": 8, "num_blocks": blocks, "kernels": kernels}
    return perturb(build_shell(core, 8, 0.04, {**shape, "regions": regions, "bands": bands}), 0.3)


def drawn(shell: ShellDenoiser, height: int = 0, width: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(images, of more detail on the left; one level an image; noise); two, square unless told otherwise."""
    g = torch.Generator().manual_seed(0)
    height, width = height or shell.resolution, width or shell.resolution
    images, noise = (torch.randn(2, 3, height, width, generator=g) for _ in range(2))
    images = 0.4 * images * torch.linspace(1, 0, width)
    return images, (0.5 * torch.randn(2, generator=g) - 1).exp(), noise


def levels_of(sigma: Tensor, images: Tensor) -> Tensor:
    """Maps of levels that differ, for the finest of two octaves: of patches of 8 px."""
    g, grid = torch.Generator().manual_seed(3), [side // 8 for side in images.shape[2:]]
    return sigma[:, None, None, None] * (0.7 * torch.randn(len(sigma), 1, *grid, generator=g)).exp()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(("patch", "below", "blocks", "kernels"), SHAPES)
def test_a_tile_with_its_halo_equals_the_whole_pass(
    patch: int, below: int, blocks: int, kernels: str, regions: bool
) -> None:
    shell = shell_of(patch, below, blocks, kernels, regions, resolution=256)
    images, sigma, noise = drawn(shell, 192, 320)
    cut = tiling(shell, images.shape[2:], 32)
    assert cut.window <= min(images.shape[2:])
    if regions:
        sigma = levels_of(sigma, images)
    n = cut.count
    numbers = [0, n // 2 + 4, n - 1, n + 5, 2 * n - cut.columns // 2]  # corners, the middle, edges
    tiles = cut.from_index(torch.tensor(numbers))
    with torch.no_grad():
        low = shell.below.estimate(pool(images + noise), sigma / 2, captions(2))
        whole = shell.add_octave(images + noise, low, sigma, captions(2))
        made = tile_octave(shell, images + noise, low, sigma, captions(2), cut, tiles)
    torch.testing.assert_close(made.denoised, cut.tiles(whole.denoised, tiles), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.features, cut.tiles(whole.features, tiles), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_a_tile_is_told_of_its_low_band(regions: bool) -> None:
    shell = shell_of(patch=2, regions=regions, bands=True, resolution=256)
    images, sigma, noise = drawn(shell)
    cut = tiling(shell, images.shape[2:], 32)
    if regions:
        sigma = levels_of(sigma, images)
    held = sigma * torch.tensor([0.1, 4.0]).view(-1, *[1] * (sigma.ndim - 1))
    low = LowBand(0.9 * pool(images), held)
    tiles = cut.all_tiles(2, images.device)
    given = shell, images, sigma, noise, captions(2)
    weight = torch.ones(len(tiles.rows))
    with torch.no_grad():
        loss, error = tiled_loss(*given, cut, (tiles, weight), low)
        whole, whole_error = denoising_loss(*given, low)
        plain, _ = denoising_loss(*given)
    torch.testing.assert_close(loss.mean(), whole.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(error.mean(), whole_error.mean(), atol=1e-5, rtol=1e-5)
    assert (whole - plain).abs().mean() > 1e-3


@pytest.mark.parametrize("side", [1, 4])
def test_tiles_go_back_to_their_places(side: int) -> None:
    x = torch.randn(2, 3, 32, 32)
    cut = Tiling(64, 64, 64 // side, 0)
    tiles = cut.all_tiles(2, x.device)
    some = cut.from_index(torch.tensor([0, 2 * side**2 - 1]))
    assert torch.equal(cut.scatter(torch.zeros_like(x), cut.tiles(x, tiles), tiles), x)
    before = x.clone()
    pasted = cut.scatter(x, cut.tiles(x, some) + 1, some)
    assert torch.equal(x, before) and int((pasted != x).sum()) == 2 * 3 * (32 // side) ** 2
    torch.testing.assert_close(cut.tiles(pasted, some), cut.tiles(x, some) + 1)


@pytest.mark.parametrize(("patch", "below", "blocks", "kernels"), SHAPES)
def test_the_receptive_radius_is_how_far_the_shell_looks_and_no_px_more(
    patch: int, below: int, blocks: int, kernels: str
) -> None:
    """By gradients, which say of every pixel whether it matters."""
    shell = shell_of(patch, below, blocks, kernels).double()
    shell.dtype = shell.below.dtype = torch.float64
    px, radius = coarsest_px(shell), receptive_radius(shell.net)
    resolution = 2 * px * math.ceil((radius + px) / px)
    noisy = torch.randn(1, 3, resolution, resolution, dtype=torch.float64, requires_grad=True)
    low = torch.randn(1, 3, resolution // 2, resolution // 2, dtype=torch.float64)
    features = torch.randn(1, 8, resolution // 2 // below, resolution // 2 // below, dtype=torch.float64)
    text = Conditioning(*(t.double() if t.is_floating_point() else t for t in captions(1)[:3]))
    c_noise = torch.zeros(1, dtype=torch.float64)
    out, _ = shell.net(torch.cat([noisy]), low, features, c_noise, text)
    start = resolution // 2
    out[..., start : start + px, start : start + px].square().sum().backward()
    assert noisy.grad is not None
    rows = noisy.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert (start - int(rows.min()), int(rows.max()) + 1 - start - px) == (radius, radius)


@pytest.mark.parametrize("regions", [False, True])
def test_weighted_tiles_have_the_loss_and_gradient_of_whole_images_on_average(regions: bool) -> None:
    """The mean over all that may be drawn, each as likely as it is: exact but for rounding."""
    shell = shell_of(regions=regions, resolution=128)
    images, sigma, noise = drawn(shell)
    if regions:
        sigma = levels_of(sigma, images)
    parameters = [p for name, p in shell.named_parameters() if not name.startswith("below")]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    loss, error = denoising_loss(shell, images, sigma, noise, captions(2))
    cut = tiling(shell, images.shape[2:], 32)
    chance = tile_probabilities(images, shell.high_band_variance, cut)
    weight = 1 / (chance.shape[1] * chance.flatten())
    tiles = cut.all_tiles(2, images.device)
    losses, errors = tiled_loss(shell, images, sigma, noise, captions(2), cut, (tiles, weight))
    likely = chance.flatten() / len(images)
    mean_loss = (likely * losses.flatten(1).mean(dim=1) if regions else likely * losses).sum()
    mean_error = (likely * errors.flatten(1).mean(dim=1) if regions else likely * errors).sum()
    torch.testing.assert_close(mean_loss, loss.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean_error, error.mean(), atol=1e-5, rtol=1e-5)
    expected = gradient(loss.mean())
    assert (gradient(mean_loss) - expected).norm() < 1e-4 * expected.norm()


def test_tiles_are_drawn_as_often_as_they_are_likely() -> None:
    shell = shell_of(resolution=128)
    images, _, _ = drawn(shell)
    cut, n = tiling(shell, images.shape[2:], 32), 20000
    chance = tile_probabilities(images, shell.high_band_variance, cut)
    tiles, weight = draw_tiles(chance, n, cut, torch.Generator().manual_seed(0))
    number = tiles.rows * cut.count + tiles.y * cut.columns + tiles.x
    found = torch.bincount(number, minlength=chance.numel()).double()
    expected = n * chance.flatten().double()
    free = chance.numel() - len(chance)  # as many draws an image, whatever they are
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert abs(chi_square - free) < 4 * math.sqrt(2 * free)
    torch.testing.assert_close(weight, 1 / (cut.count * chance.flatten()[number]))
    # Their weights make up for it: a mean over draws of a number of each tile is that over tiles.
    value = torch.randn(chance.numel(), generator=torch.Generator().manual_seed(1))
    terms = (weight * value[number]).double()
    error = float(terms.mean() - value.mean())
    assert abs(error) < 4 * float(terms.std()) / math.sqrt(len(terms))


def test_detail_is_drawn_more_often_than_a_flat_tile() -> None:
    images = torch.zeros(1, 3, 128, 128)
    images[..., :64, :64] = torch.randn(3, 64, 64)
    variance = float(torch.randn(3, 64, 64).square().mean())
    chance = tile_probabilities(images, variance, Tiling(128, 128, 64, 0))[0]
    assert chance.sum() == pytest.approx(1)
    assert float(chance[0] / chance[1]) == pytest.approx(1 + 1 / MIN_PROBABILITY, rel=0.05)
    assert torch.equal(chance[1:], chance[1].expand(3))


def test_shells_of_256_px_and_more_are_trained_on_tiles_that_save_half_of_the_work() -> None:
    assert trained_tiles(shell_of(resolution=128), (128, 128)) is None
    assert trained_tiles(shell_of(patch=4, blocks=1, resolution=256), (256, 256)) is None  # windows of 192 px
    found = trained_tiles(shell_of(resolution=256), (192, 320))
    assert found is not None and (found[1].rows, found[1].columns) == (3, 5)
    counts = []
    for resolution in (256, 512, 1024):
        found = trained_tiles(shell_of(blocks=3, resolution=resolution), (resolution, resolution))
        assert found is not None and found[1].window == 64 + 2 * 34
        counts.append(found[2])
    assert counts == [1, 3, 15]


class Pictures:
    """Two random pictures, in the place of a data set."""

    def at(self, nimg: int, shard: int) -> Batch:
        images = torch.randint(256, (2, 3, 256, 256), generator=torch.Generator().manual_seed(nimg + shard))
        return Batch(images.to(torch.uint8), 1, captions(2), None)


def test_a_training_step_of_a_large_shell_passes_windows_and_is_a_function_of_the_clock() -> None:
    shell = shell_of(resolution=256)
    step = DenoisingStep(
        denoiser=shell,
        batches=Pictures(),
        statistics=Statistics((0.0,) * 3, (0.6,) * 3),
        draw_sigma=lambda batch, generator: torch.rand(batch, generator=generator) + 0.1,
        settings=DenoisingSettings(
            seed=0, batch_size=4, shards=2, lr=0.01, warmup_images=0, num_images=8, text_dropout=0.1
        ),
    )
    seen: list[tuple[int, ...]] = []
    hook = shell.net.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        first, again, other = (step.shard_loss(0, shard) for shard in (0, 0, 1))
    hook.remove()
    assert seen == [(2, 3, 100, 100)] * 3  # 64 and halos of 18
    assert first[0] == again[0] != other[0] and all(torch.isfinite(x) for x in (*first, *other))
