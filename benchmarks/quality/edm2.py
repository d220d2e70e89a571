"""EDM2's configuration, small: the network, preconditioning, loss and sampler of Karras et al., "Analyzing and
Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), configuration G, written from the paper.

The magnitude-preserving layers are those of pipeline/models/layers.py, which are the paper's; weights are
normalised by force, and trained by Adam with power-function averages (pipeline/training/state.py). What differs is
forced by the task: an embedded caption stands where the class label does, and the network is narrow. All pixels are
worked on at full resolution: nothing here knows of a pyramid.

Shapes: B images, C channels, H and W pixels of the feature map, D numbers of a caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.diffusion.noise import karras_sigmas
from pipeline.models.layers import FourierFeatures, MPConv, SelfAttention, mp_cat, mp_silu, mp_sum, unit_rms

SIGMA_DATA = 0.5
P_MEAN, P_STD = -0.8, 1.6  # of ln sigma in training, for pixels (table 6)
RESIDUAL = 0.3  # t of the sums with residual and attention branches
CLIP = 256.0  # of activations
ATTENTION = (16, 8)  # px of the feature maps with attention
LOGVAR_CHANNELS = 128

Denoise = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A block of the encoder or the decoder (figure 21)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        decoder: bool,
        attention: bool = False,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.decoder, self.resample = decoder, resample
        self.conv_skip = MPConv(channels_in, channels_out, 1) if channels_in != channels_out else None
        self.conv_res0 = MPConv(channels_in if decoder else channels_out, channels_out, 3)
        self.conv_res1 = MPConv(channels_out, channels_out, 3)
        self.emb = MPConv(embedding, channels_out, 0)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.attention = SelfAttention(channels_out) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map [B,C,H,W] and the embedding [B,E] to [B,C',H',W']."""
        # Main branch.
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        skip = x if self.conv_skip is None else self.conv_skip(x)
        if not self.decoder:
            x = skip = unit_rms(skip, dim=1)  # pixel norm

        # Residual branch.
        y = self.conv_res0(mp_silu(x))
        scale = self.emb(emb) * self.emb_gain + 1
        y = self.conv_res1(mp_silu(y * scale[:, :, None, None].to(y.dtype)))
        x = mp_sum(skip, y, RESIDUAL)

        # Attention.
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), RESIDUAL)
        return x.clamp(-CLIP, CLIP)


class UNet(nn.Module):
    """The raw network F."""

    def __init__(
        self,
        resolution: int,
        text_dim: int,
        width: int,
        multiples: tuple[int, ...],
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        widths = [width * m for m in multiples]
        sizes = [resolution >> i for i in range(len(widths))]
        embedding = max(widths)
        self.emb_noise_features = FourierFeatures(width)
        self.emb_noise = MPConv(width, embedding, 0)
        self.emb_text = MPConv(text_dim, embedding, 0)

        # Encoder.
        self.conv_in = MPConv(4, widths[0], 3)
        self.encoder, skips, channels = nn.ModuleList(), [widths[0]], widths[0]
        for size, wide in zip(sizes, widths, strict=True):
            if size != resolution:
                self.encoder.append(Block(channels, channels, embedding, False, resample="down"))
                skips.append(channels)
            for _ in range(num_blocks):
                self.encoder.append(Block(channels, wide, embedding, False, size in ATTENTION))
                channels = wide
                skips.append(channels)

        # Decoder: blocks that take a skip connection are named in `joined`.
        self.decoder, self.joined = nn.ModuleList(), []
        for size, wide in reversed(list(zip(sizes, widths, strict=True))):
            if size == sizes[-1]:
                self.decoder.append(Block(channels, channels, embedding, True, attention=True))
                self.decoder.append(Block(channels, channels, embedding, True))
                self.joined += [False, False]
            else:
                self.decoder.append(Block(channels, channels, embedding, True, resample="up"))
                self.joined.append(False)
            for _ in range(num_blocks + 1):
                self.decoder.append(Block(channels + skips.pop(), wide, embedding, True, size in ATTENTION))
                self.joined.append(True)
                channels = wide
        self.conv_out = MPConv(channels, 3, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def embed(self, c_noise: Tensor, caption: Tensor) -> Tensor:
        """The embedding [B,E] of a noise level [B] and a caption [B,D]."""
        noise = self.emb_noise(self.emb_noise_features(c_noise))
        return mp_silu(mp_sum(noise, self.emb_text(unit_rms(caption.float(), dim=1))))

    def forward(self, x: Tensor, c_noise: Tensor, caption: Tensor) -> Tensor:
        """Map [B,3,H,W] of unit variance to [B,3,H,W]."""
        emb = self.embed(c_noise, caption)
        x = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # the constant replaces biases
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block, joined in zip(self.decoder, self.joined, strict=True):
            x = block(mp_cat(x, skips.pop()) if joined else x, emb)
        return self.conv_out(x) * self.out_gain


class Denoiser(nn.Module):
    """D(x; sigma, caption) with EDM's preconditioning, and the uncertainty u(sigma) (section 2.2)."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net = net
        self.logvar_features = FourierFeatures(LOGVAR_CHANNELS)
        self.logvar = MPConv(LOGVAR_CHANNELS, 1, 0)
        self.dtype = torch.float32

    def forward(self, noisy: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        """Denoise images [B,3,H,W] in -1..1 at sigma [B]."""
        s = sigma[:, None, None, None]
        norm = (s**2 + SIGMA_DATA**2).sqrt()
        x = (noisy / norm).to(self.dtype).contiguous(memory_format=torch.channels_last)
        out = self.net(x, sigma.log() / 4, caption)
        return SIGMA_DATA**2 / norm**2 * noisy + s * SIGMA_DATA / norm * out.float()

    def loss(self, images: Tensor, caption: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of each of images [B,3,H,W] in -1..1, weighted by the uncertainty (eq. 14, 15): [B]."""
        sigma = (torch.randn(len(images), generator=generator) * P_STD + P_MEAN).exp()
        noise = torch.randn(images.shape, generator=generator)
        denoised = self(images + sigma[:, None, None, None] * noise, sigma, caption)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        error = weight * (denoised - images).square().mean(dim=(1, 2, 3))
        u = self.logvar(self.logvar_features(sigma.log() / 4))[:, 0]
        return error / u.exp() + u


@torch.no_grad()
def heun(denoise: Denoise, noise: Tensor, num_steps: int) -> Tensor:
    """EDM's deterministic sampler (arXiv 2206.00364, algorithm 1): `noise` [B,3,H,W] to images, in 2 num_steps - 1
    calls of `denoise(x, sigma [B])`."""
    sigmas = karras_sigmas(num_steps, 80.0, 0.002).tolist()
    x = noise * sigmas[0]
    for sigma, to in pairwise(sigmas):
        slope = (x - denoise(x, x.new_full((len(x),), sigma))) / sigma
        ahead = x + (to - sigma) * slope
        if to > 0:
            second = (ahead - denoise(ahead, x.new_full((len(x),), to))) / to
            ahead = x + (to - sigma) * (slope + second) / 2
        x = ahead
    return x


def learning_rate(peak: float, progress: float, warmup: float = 0.02, flat: float = 0.3) -> float:
    """A linear warm-up, constant, then 1/sqrt (eq. 67), by the fraction of the training that is done."""
    return peak * min(progress / warmup, 1.0) / math.sqrt(max(progress / flat, 1.0))
