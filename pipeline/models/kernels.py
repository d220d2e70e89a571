"""Adaptive kernels: depthwise branches at three scales, mixed for each region by noise level and content.

For images whose power falls as 1/f^2 the support of the Wiener filter grows with the noise level, so noisier
regions want larger kernels. Operators that vary with the noise level are those of MEME (arXiv 2306.04990);
mixing them by region is new here. Encoder blocks have them. B images, C channels, H x W positions of the
feature map, g x g patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.conditioning import REGION_FEATURES, Conditioning, NoiseConditioning
from pipeline.models.layers import SILU_GAIN, MPConv
from pipeline.models.resample import pool, resize

SCALES = 3  # branch k covers 3 * 2^k positions each way
HIDDEN = 8  # channels of the content that mixing weights depend on


class KernelMix(nn.Module):
    """x~ = (x + g sum_k pi_k b_k) / sqrt(1 + g^2), with b_k = U^k DW_k P^k x: depthwise 3x3 on means over 2^k.

    The mixing weights pi are a softmax over k. They depend on `mode`: "fixed" (a third each), "noise" (the
    level, and the relative level of the patch), "content" (x itself), or "both". g = 0 at first: x~ is x, bit
    for bit."""

    def __init__(self, channels: int, mode: str, px: int, regions: bool = False) -> None:
        super().__init__()
        assert mode in ("fixed", "noise", "content", "both")
        self.px = px  # of the image, in one position of the feature map
        self.branches = nn.ModuleList(MPConv(channels, channels, 3, groups=channels) for _ in range(SCALES))
        self.gain = nn.Parameter(torch.zeros([]))  # g
        features = 2 + (REGION_FEATURES if regions else 0)
        by_noise, by_content = mode in ("noise", "both"), mode in ("content", "both")
        self.by_level = nn.Parameter(torch.zeros(SCALES, features)) if by_noise else None
        self.squeeze = MPConv(channels, HIDDEN, kernel=1, gain=SILU_GAIN) if by_content else None
        self.by_content = nn.Parameter(torch.zeros(SCALES, HIDDEN)) if by_content else None

    def mixing_weights(self, x: Tensor, level: NoiseConditioning) -> Tensor:
        """pi, float32: [B,3,H,W], or [B,3,1,1] where they are the same everywhere."""
        grid = max(x.shape[-1] // 4, 1)
        logits = torch.zeros(x.shape[0], SCALES, 1, 1, device=x.device)
        if self.by_level is not None:
            inputs = torch.stack([torch.ones_like(level.c_noise), level.c_noise], dim=1).to(self.by_level)
            logits = logits + (inputs @ self.by_level[:, :2].t())[:, :, None, None]
            if level.regions is not None and self.by_level.shape[1] > 2:
                logits = logits + F.conv2d(
                    resize(level.regions, grid).to(self.by_level), self.by_level[:, 2:, None, None]
                )
        if self.squeeze is not None and self.by_content is not None:
            content = F.silu(self.squeeze(resize(x, grid)).to(self.by_content))
            logits = logits + F.conv2d(content, self.by_content[:, :, None, None])
        weights = logits.softmax(dim=1)
        if weights[0, 0].numel() == 1:
            return weights
        return F.interpolate(weights, size=x.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, x: Tensor, level: NoiseConditioning) -> Tensor:
        """Mix [B,C,H,W], a SiLU; H and W are multiples of 4."""
        weights = self.mixing_weights(x, level)
        g, coarse, out = self.gain, x, x
        for k, branch in enumerate(self.branches):
            coarse = pool(coarse) if k else coarse
            mean = resize(branch(coarse), x.shape[-1])
            out = torch.addcmul(out, (g * weights[:, k : k + 1]).to(x.dtype), mean)
        return out * (1 + g.square()).rsqrt().to(x.dtype)


def mixes(denoiser: nn.Module) -> dict[str, KernelMix]:
    """The mixes of a network by the names of their blocks, without those of the level below."""
    return {
        name.removeprefix("net.").removesuffix(".mixer"): module
        for name, module in denoiser.named_modules()
        if isinstance(module, KernelMix) and not name.startswith("below")
    }


@torch.no_grad()
def mean_kernel_px(
    denoiser: nn.Module,
    images: Tensor,
    text: Conditioning,
    sigmas: Sequence[float],
    generator: torch.Generator,
) -> dict[str, list[float]]:
    """Mean effective kernel, sum_k pi_k 3 * 2^k positions in px of the image, of each mix of a network.

    images [B,3,R,R], standardised, are denoised at each of `sigmas` with the same noise. Returns {block: one
    number a level}, without the blocks of the level below; empty where kernels are off."""
    curves: dict[str, list[float]] = {}

    def measure(name: str, mix: nn.Module, inputs: Any, _: Any) -> None:
        assert isinstance(mix, KernelMix)
        sizes = 3 * mix.px * 2 ** torch.arange(SCALES, device=images.device)
        curves.setdefault(name, []).append(
            float((mix.mixing_weights(*inputs).mean(dim=(0, 2, 3)) * sizes).sum())
        )

    hooks = [mix.register_forward_hook(partial(measure, block)) for block, mix in mixes(denoiser).items()]
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    for sigma in sigmas if hooks else ():
        denoiser(images + sigma * noise, torch.full((len(images),), sigma, device=images.device), text)
    for hook in hooks:
        hook.remove()
    return curves
