"""Magnitude-preserving layers: activations keep unit variance from input to output, so no layer needs
normalisation statistics and the learning rate alone decides how fast weights turn.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696,
sections 2.2-2.4 and appendix B (equation numbers below are theirs). Written from the equations.

Shapes: B images, C channels, H and W pixels of the feature map, T text tokens, D text width. Feature maps are
channels_last in memory, which convolutions and attention read without a copy, on a CPU as on a GPU. B is read as
x.shape[0], since len(x) would fix it in an exported program (pipeline/export).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.models.conditioning import REGION_FEATURES, Conditioning, NoiseConditioning
from pipeline.models.resample import resize


def unit_rms(x: Tensor, dim: int | tuple[int, ...], eps: float = 1e-8) -> Tensor:
    """Scale `x` to unit root mean square along `dim` (eq. 30, pixel normalisation); a zero stays zero, with a
    finite gradient."""
    norm = torch.linalg.vector_norm(
        x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    count = math.prod([x.shape[d] for d in ((dim,) if isinstance(dim, int) else dim)])
    return x * (math.sqrt(count) / (norm + eps)).to(x.dtype)


SILU_GAIN = 1 / 0.596


def mp_silu(x: Tensor) -> Tensor:
    """SiLU scaled so that unit Gaussian input gives unit second moment (eq. 81)."""
    return F.silu(x) * SILU_GAIN


def sum_weights(t: float) -> tuple[float, float]:
    """The factors of a and b in `mp_sum`."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Weighted sum that keeps the variance of uncorrelated unit-variance inputs (eq. 88)."""
    of_a, of_b = sum_weights(t)
    return torch.add(a * of_a, b, alpha=of_b)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate channels so that both inputs contribute equally to the variance (eq. 103, t = 0.5)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / 2)
    return torch.cat([a * (scale / math.sqrt(n_a)), b * (scale / math.sqrt(n_b))], dim=1)


class FourierFeatures(nn.Module):
    """Random Fourier features of a scalar with unit variance (eq. 75); frequencies are fixed, not trained."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 [B] to [B, channels]; float32 throughout, since bfloat16 merges close noise levels."""
        return torch.cos(x.float()[:, None] * self.freqs + self.phases) * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution (or linear layer, `kernel` = 0) whose filters always have unit norm (eq. 47, 66), times `gain`.

    The stored filters have unit root mean square: `renormalize_` projects them back after every optimizer step,
    and `tangent_gradient_` removes the radial part of the gradient before it (what differentiating the division
    by the norm would do). So `forward` only scales by a constant, and a step touches the weights once.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, groups: int = 1, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.groups = groups
        shape = (channels_out, channels_in // groups) + ((kernel, kernel) if kernel else ())
        self.weight = nn.Parameter(torch.randn(shape))
        self.fan_in = self.weight[0].numel()
        self.scale = gain / math.sqrt(self.fan_in)
        self.kept: tuple[object, Tensor] | None = None  # filters to use, where frozen; not part of the state
        renormalize_(self.weight.data)

    def filters(self, dtype: torch.dtype) -> Tensor:
        """The filters to use. Frozen ones are scaled and cast once, and again only where they were loaded or moved;
        compiled graphs do without, since they fuse it."""
        if self.weight.requires_grad or torch.compiler.is_compiling():
            return self.weight.to(dtype) * self.scale
        version = (self.weight._version, self.weight.device, self.weight.dtype, dtype)
        if self.kept is None or self.kept[0] != version:
            self.kept = version, self.weight.detach().to(dtype) * self.scale
        return self.kept[1]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [B, C_in, ...]."""
        weight = self.filters(x.dtype)
        if weight.ndim == 2:
            return x @ weight.t()
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=self.groups)


def renormalize_(filters: Tensor) -> None:
    """Project filters [N, ...] back to unit root mean square (forced weight normalisation, eq. 66)."""
    norm = torch.linalg.vector_norm(filters, dim=tuple(range(1, filters.ndim)), keepdim=True)
    filters.mul_(math.sqrt(filters[0].numel()) / norm.clamp_min(1e-8))


def tangent_gradient_(gradient: Tensor, filters: Tensor) -> None:
    """Project the gradient of filters [N, F] of unit root mean square onto the sphere's tangent:
    g - w (w.g) / (w.w)."""
    along = (filters * gradient).sum(dim=1, keepdim=True)
    gradient.addcmul_(filters, along, value=-1 / filters.shape[1])


def heads(channels: int, channels_per_head: int) -> int:
    """The largest number of heads of at least `channels_per_head` channels that divide `channels`."""
    return next(n for n in range(max(1, channels // channels_per_head), 0, -1) if channels % n == 0)


def pixels(x: Tensor) -> Tensor:
    """[B,C,H,W] to [B,HW,C]; a view where channels lie last in memory."""
    return x.flatten(2).transpose(1, 2)


def unpixels(x: Tensor, like: Tensor) -> Tensor:
    """[B,HW,C] to [B,C,H,W], with the H and W of `like`."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])


class SelfAttention(nn.Module):
    """Cosine self-attention over the pixels of a small feature map (2312.02696, section 2.2), times `gain`."""

    def __init__(self, channels: int, channels_per_head: int = 64, gain: float = 1.0) -> None:
        super().__init__()
        self.num_heads = heads(channels, channels_per_head)
        self.qkv = MPConv(channels, channels * 3, kernel=1)
        self.proj = MPConv(channels, channels, kernel=1, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,C,H,W] to the attention branch of the same shape."""
        qkv = pixels(self.qkv(x)).unflatten(2, (3, self.num_heads, -1))  # [B, HW, 3, heads, C/heads]
        q, k, v = unit_rms(qkv, dim=-1).transpose(1, 3).unbind(2)  # [B, heads, HW, C/heads]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(unpixels(y.transpose(1, 2).flatten(2), x))


class TextAttention(nn.Module):
    """Cross-attention from pixels to caption tokens, times `gain`. A learned null token is always visible, so that
    an empty caption is well defined and a pixel may ignore the text."""

    def __init__(self, channels: int, text_dim: int, channels_per_head: int = 64, gain: float = 1.0) -> None:
        super().__init__()
        self.num_heads = heads(channels, channels_per_head)
        self.q = MPConv(channels, channels, kernel=1)
        self.kv = MPConv(text_dim, channels * 2, kernel=0)
        self.null = nn.Parameter(torch.randn(1, 1, text_dim))
        self.proj = MPConv(channels, channels, kernel=1, gain=gain)

    def forward(self, x: Tensor, text: Conditioning) -> Tensor:
        """Map pixels [B,C,H,W] and text to the attention branch [B,C,H,W]."""
        null = self.null.expand(x.shape[0], -1, -1)
        tokens = torch.cat([null, text.tokens], dim=1).to(x.dtype)  # [B, 1+T, D]
        visible = F.pad(text.mask, (1, 0), value=True)[:, None, None]  # [B, 1, 1, 1+T]
        q = pixels(self.q(x)).unflatten(2, (self.num_heads, -1))  # [B, HW, heads, C/heads]
        kv = self.kv(unit_rms(tokens, dim=-1)).unflatten(2, (2, self.num_heads, -1))
        q = unit_rms(q, dim=-1).transpose(1, 2)  # [B, heads, HW, C/heads]
        k, v = unit_rms(kv, dim=-1).transpose(1, 3).unbind(2)  # [B, heads, 1+T, C/heads]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.proj(unpixels(y.transpose(1, 2).flatten(2), x))


class Embedding(nn.Module):
    """Noise level, pooled caption and augmentation labels to one vector (2312.02696, figure 21; text takes the
    place of class). Without bias, labels of 0 add exactly nothing."""

    def __init__(self, noise_channels: int, channels: int, text_dim: int, augment_labels: int = 0) -> None:
        super().__init__()
        self.fourier = FourierFeatures(noise_channels)
        self.noise = MPConv(noise_channels, channels, kernel=0)
        self.text = MPConv(text_dim, channels, kernel=0)
        self.null = nn.Parameter(torch.randn(1, text_dim))
        self.augment = MPConv(augment_labels, channels, kernel=0) if augment_labels else None
        self.augment_gain = nn.Parameter(torch.zeros([])) if augment_labels else None

    def forward(self, c_noise: Tensor, text: Conditioning) -> Tensor:
        """Map c_noise [B] and text to [B, channels] in float32."""
        has_text = text.mask.any(dim=1, keepdim=True)
        pooled = unit_rms(torch.where(has_text, text.pooled, self.null), dim=-1)
        emb = mp_sum(self.noise(self.fourier(c_noise)), self.text(pooled))
        if self.augment is not None and text.augment is not None:
            emb = emb + self.augment(text.augment) * self.augment_gain
        return mp_silu(emb)


class RegionConv(nn.Module):
    """The contribution of a patch's relative noise level to `channels` channels: zero at first (zero gain), and
    always where the image has one level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = MPConv(REGION_FEATURES, channels, kernel=1)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, regions: Tensor, width: int) -> Tensor:
        """Map phi(r) [B,4,g,g] to float32 [B,C,h,width]; one patch to [B,C,1,1]."""
        x = self.conv(regions) * self.gain
        return resize(x, width) if x[0, 0].numel() > 1 else x


class Block(nn.Module):
    """Residual block (2312.02696, figure 21). `flavor` "enc" normalises pixels first, "dec" does not.

    `regions` lets the relative noise level of a patch scale its channels, `bands` that of the low band; `mixer`
    changes what the first convolution reads (pipeline/models/kernels.py)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb_channels: int,
        flavor: str,
        text_dim: int = 0,  # 0: no attention in this block
        dropout: float = 0.0,
        balance: float = 0.3,  # weight of the residual branch in the sum
        regions: bool = False,
        mixer: nn.Module | None = None,  # maps ([B,C,H,W], NoiseConditioning) to [B,C,H,W]
        bands: bool = False,
    ) -> None:
        super().__init__()
        self.flavor = flavor
        self.dropout = dropout
        # Residual sums are mp_sum, with the factor of the branch in its layers.
        self.keep, add = sum_weights(balance)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.emb_linear = MPConv(emb_channels, channels_out, kernel=0)
        self.conv_skip = MPConv(channels_in, channels_out, kernel=1) if channels_in != channels_out else None
        width = channels_out if flavor == "enc" else channels_in
        self.conv_res0 = MPConv(width, channels_out, kernel=3, gain=SILU_GAIN)
        self.conv_res1 = MPConv(channels_out, channels_out, kernel=3, gain=SILU_GAIN * add)
        self.self_attention = SelfAttention(channels_out, gain=add) if text_dim else None
        self.text_attention = TextAttention(channels_out, text_dim, gain=add) if text_dim else None
        self.region_scale = RegionConv(channels_out) if regions else None
        self.band_scale = RegionConv(channels_out) if bands else None
        self.mixer = mixer
        self.recompute = False  # keep only the input for the backward pass (arXiv 1604.06174)

    def forward(self, x: Tensor, level: NoiseConditioning, text: Conditioning) -> Tensor:
        """Map [B,C_in,H,W] to [B,C_out,H,W]."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, level, text, use_reentrant=False)
        return self._forward(x, level, text)

    def _forward(self, x: Tensor, level: NoiseConditioning, text: Conditioning) -> Tensor:
        if self.flavor == "enc":
            x = self.conv_skip(x) if self.conv_skip is not None else x
            x = unit_rms(x, dim=1)
        # Residual branch, scaled by the embedding.
        scale = (self.emb_linear(level.emb) * self.emb_gain + 1)[:, :, None, None]
        if self.region_scale is not None and level.regions is not None:
            scale = scale + self.region_scale(level.regions, x.shape[-1])
        if self.band_scale is not None and level.bands is not None:
            scale = scale + self.band_scale(level.bands, x.shape[-1])
        y = F.silu(x)
        if self.mixer is not None:
            y = self.mixer(y, level)
        y = self.conv_res0(y)
        y = F.silu(y * scale.to(y.dtype))
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = torch.add(y, x, alpha=self.keep)
        # Attention.
        if self.self_attention is not None and self.text_attention is not None:
            x = torch.add(self.self_attention(x), x, alpha=self.keep)
            x = torch.add(self.text_attention(x, text), x, alpha=self.keep)
        return x
