"""Adaptive kernels: nothing at first, mixes by hand, gradients in float64, cost, and the curve of their size."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.conditioning import NoiseConditioning, region_features
from pipeline.models.denoiser import build_core, build_shell
from pipeline.models.kernels import KernelMix, mean_kernel_px
from pipeline.training.reports import save_kernels
from tests.builders import SHELL, no_text

NET = {"patch": 2, "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention": [8], "dropout": 0.0}
MODES = ["fixed", "noise", "content", "both"]


def level(n: int, dtype: torch.dtype = torch.float32) -> NoiseConditioning:
    r = torch.linspace(-1, 1, 16, dtype=dtype).view(1, 1, 4, 4).expand(n, -1, -1, -1)
    return NoiseConditioning(
        torch.zeros(n, 1), torch.linspace(-1, 1, n, dtype=dtype), region_features(r).to(dtype)
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_new_network_with_kernels_is_the_one_without(mode: str) -> None:
    x, sigma = torch.randn(2, 3, 64, 64), torch.tensor([0.3, 4.0])
    plain, adaptive = (
        build_shell(
            build_core(32, 8, {**NET, "kernels": m}),
            8,
            0.04,
            {**SHELL, "kernels": m},
        )
        for m in ("off", mode)
    )
    assert not any("mixer" in name for name in plain.state_dict())
    missing, unexpected = adaptive.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected and all("mixer" in name for name in missing)
    for model in (plain, adaptive):
        for name, p in model.named_parameters():
            if name.endswith("gain") and "mixer" not in name:
                torch.nn.init.constant_(p, 0.7)
    assert torch.equal(plain(x, sigma, no_text(2)), adaptive(x, sigma, no_text(2)))


def test_small_feature_maps_and_decoders_keep_plain_convolutions() -> None:
    core = build_core(32, 8, {**NET, "kernels": "both"})
    mixed = {name.split(".mixer")[0] for name in core.state_dict() if ".mixer." in name}
    assert mixed == {"net.encoder.0.0"}


def test_fixed_kernels_equal_a_sum_by_hand() -> None:
    mix = KernelMix(3, "fixed", px=1)
    torch.nn.init.constant_(mix.gain, 0.8)
    x = torch.randn(2, 3, 8, 8)
    total = torch.zeros_like(x)
    for k, branch in enumerate(mix.branches):
        for c in range(3):  # one channel after the other
            seen = x[:, c : c + 1]
            if k:
                seen = seen.unfold(2, 2**k, 2**k).unfold(3, 2**k, 2**k).mean(dim=(-1, -2))
            kernel = branch.weight[c : c + 1] / 3
            seen = F.conv2d(F.pad(seen, (1, 1, 1, 1)), kernel)
            total[:, c : c + 1] += F.interpolate(seen, scale_factor=2**k, mode="nearest") / 3
    expected = (x + 0.8 * total) / math.sqrt(1.64)
    torch.testing.assert_close(mix(x, level(2)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_agree_with_finite_differences_in_float64(mode: str) -> None:
    torch.manual_seed(0)
    mix = KernelMix(2, mode, px=1, regions=True).double()
    for p in (mix.gain, mix.by_level, mix.by_content):
        if p is not None:
            torch.nn.init.normal_(p)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mix.named_parameters(), strict=True)
    where = level(1, torch.float64)

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mix, dict(zip(names, weights, strict=True)), (x, where))

    assert torch.autograd.gradcheck(call, (x, *values), eps=1e-6, atol=1e-6, fast_mode=True)


def test_every_part_learns_once_the_gain_has_moved() -> None:
    mix, x = KernelMix(4, "both", px=1, regions=True), torch.randn(2, 4, 16, 16)
    mix(x, level(2)).square().sum().backward()
    assert mix.gain.grad is not None and float(mix.gain.grad.abs()) > 0  # at zero it is not dead
    torch.nn.init.constant_(mix.gain, 0.5)
    mix(x, level(2)).square().sum().backward()
    for name in ("by_level", "by_content"):
        assert float(getattr(mix, name).grad.abs().min()) > 0


def test_kernels_cost_twelve_multiply_adds_a_channel_and_position() -> None:
    channels, size = 32, 32
    with torch.device("meta"):
        mix, x = KernelMix(channels, "both", px=1), torch.empty(1, channels, size, size)
        with FlopCounterMode(display=False) as counter:
            mix(x, NoiseConditioning(torch.empty(1, 1), torch.empty(1)))
    branches = 9 * channels * (1 + 1 / 4 + 1 / 16) * size**2
    content = (channels * 8 + 8 * 3) * (size // 4) ** 2
    by_level = 2 * 3
    assert counter.get_total_flops() / 2 == branches + content + by_level
    assert branches / (channels * size**2) < 12
    assert branches + content < 0.03 * 18 * channels**2 * size**2  # of the block's two convolutions


def test_the_mean_kernel_follows_the_shares(tmp_path: Path) -> None:
    core = build_core(32, 8, {**NET, "kernels": "noise"})
    images, generator = torch.randn(2, 3, 32, 32), torch.Generator().manual_seed(0)
    sigmas = [0.01, 0.1, 1.0, 10.0]
    at_first = mean_kernel_px(core, images, no_text(2), sigmas, generator)
    assert set(at_first) == {"encoder.0.0"}
    third = (3 + 6 + 12) / 3 * 2  # px, with patch 2
    assert all(sizes == pytest.approx([third] * 4) for sizes in at_first.values())
    for name, p in core.named_parameters():
        if name.endswith("by_level"):
            with torch.no_grad():
                p[2, 1] = 5  # the widest branch gains with ln sigma
    curves = mean_kernel_px(core, images, no_text(2), sigmas, generator)
    assert all(
        sizes == sorted(sizes) and 6 < sizes[0] < 13 < 18 < sizes[-1] < 24 for sizes in curves.values()
    )
    save_kernels(tmp_path / "kernels.png", sigmas, curves)
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert mean_kernel_px(build_core(32, 8, NET), images, no_text(2), sigmas, generator) == {}
