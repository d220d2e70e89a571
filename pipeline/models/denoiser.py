"""Preconditioned denoisers: how the raw networks become estimates of the clean image.

A denoiser maps (noisy, sigma, text) to the expected clean image. `CoreDenoiser` is EDM's preconditioning
(Karras et al., arXiv 2206.00364, table 1) with EDM2's learned uncertainty (arXiv 2312.02696, eq. 21).
`ShellDenoiser` adds one octave. It rests on the pooling identity: the 2x2 mean of an image with white noise
of level sigma is the half-size image with white noise of level sigma / 2, so the denoiser below applies to
the pooled input exactly as it was trained.

The level may differ by region: sigma is then a grid of square patches [B,1,g,g], the same grid at every level
of the pyramid, and a map of one level gives the bits of that level as a number [B] (see docs/method.md,
"Regions"). In a shell the low band may have its own level, `low_sigma`; at sigma / 2, the level that pooling
gives, the result has the bits of a shell that was not trained so (docs/method.md, "Upscaling").

Images are R px wide and high, or have other sides of about the same area that the networks can halve
(pipeline/config/sides.py): nothing but attention sees more than the surroundings of a pixel, and nothing knows its
place.

Everything here is float32; only the raw networks may run in bfloat16 (`dtype`). Images are standardised per
channel to mean 0 and standard deviation `SIGMA_DATA`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.conditioning import Conditioning, band_features, noise_conditioning
from pipeline.models.layers import Block, FourierFeatures, MPConv
from pipeline.models.resample import high_pass, pool, resize, upsample
from pipeline.models.shell import ShellNet
from pipeline.models.unet import UNet

SIGMA_DATA = 0.5
PATCH = 4  # px of the core that share one noise level, each way


class Estimate(NamedTuple):
    """The result of one pass of a denoiser."""

    denoised: Tensor  # [B,3,R,R]
    features: Tensor  # [B,C,h,w] for the shell above


class LogVariance(nn.Module):
    """Learned log-variance u(sigma) of the loss: the uncertainty that balances noise levels."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.fourier = FourierFeatures(channels)
        self.linear = MPConv(channels, 1, kernel=0)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, sigma: Tensor) -> Tensor:
        """Map sigma [B] or [B,1,g,g] to u, kept within +-10 so that a constant batch cannot diverge."""
        u = (self.linear(self.fourier(sigma.flatten().log() / 4)) * self.gain)[:, 0].clamp(-10, 10)
        return u.view(sigma.shape)


class Difficulty(nn.Module):
    """Predicts h = ln E[error] of each patch, in units of c_out^2, from the decoder features; u at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = MPConv(channels, 1, kernel=1)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        """Map features [B,C,h,w] and the uncertainty u(sigma) [B,1,g,g] to h [B,1,g,g], within +-10."""
        local = self.conv(resize(features.float(), u.shape[-1])) * self.gain
        return (u.detach() + local).clamp(-10, 10)


def expand(sigma: Tensor, width: int) -> Tensor:
    """Levels of the pixels of images of `width` px: [B] to [B,1,1,1], and a map [B,1,g,g] to [B,1,R,R]."""
    return sigma[:, None, None, None] if sigma.ndim == 1 else resize(sigma, width)


def mean_square(x: Tensor, sigma: Tensor) -> Tensor:
    """Mean square of [B,3,R,R] where sigma is one number: over the image [B], or over each patch [B,1,g,g]."""
    if sigma.ndim == 1:
        return x.square().mean(dim=(1, 2, 3))
    return F.avg_pool2d(x.square().mean(dim=1, keepdim=True), x.shape[-1] // sigma.shape[-1])


class CoreDenoiser(nn.Module):
    """The low-resolution denoiser D(z; sigma, text) = c_skip z + c_out F(c_in z)."""

    def __init__(self, net: UNet, resolution: int) -> None:
        super().__init__()
        self.net = net
        self.resolution = resolution
        self.logvar = LogVariance()
        self.difficulty = Difficulty(net.feature_channels) if net.regions else None
        self.dtype = torch.float32

    @property
    def feature_channels(self) -> int:
        """Channels of the features handed to a shell."""
        return self.net.feature_channels

    def estimate(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Estimate:
        """Denoise [B,3,R,R] at sigma [B] or [B,1,g,g]; also return the decoder features."""
        s = expand(sigma, noisy.shape[-1])
        norm = (s**2 + SIGMA_DATA**2).sqrt()
        c_skip, c_out, c_in = SIGMA_DATA**2 / norm**2, s * SIGMA_DATA / norm, 1 / norm
        out, features = self.net((c_in * noisy).to(self.dtype), *noise_conditioning(sigma, text))
        return Estimate(c_skip * noisy + c_out * out.float(), features)

    def forward(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise [B,3,R,R] at sigma [B]."""
        return self.estimate(noisy, sigma, text).denoised

    def assess(
        self, images: Tensor, noisy: Tensor, sigma: Tensor, text: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Squared error in units of c_out^2, mean over the pixels of an image [B] or of each patch [B,1,g,g],
        as sigma is; and the decoder features."""
        estimate = self.estimate(noisy, sigma, text)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        return weight * mean_square(estimate.denoised - images, sigma), estimate.features

    def error(self, images: Tensor, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The error of `assess`."""
        return self.assess(images, noisy, sigma, text)[0]

    def expected_error(self, sigma: Tensor) -> Tensor:
        """E|x - D|^2 per dimension that the level has learned to expect at sigma [B], its c_out^2 exp u: [B]."""
        return self.logvar(sigma).exp() * (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2)

    def encoder_features(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> list[Tensor]:
        """Feature maps of each encoder level for noisy images [B,3,R,R]; a discriminator's input."""
        c_in = 1 / (expand(sigma, noisy.shape[-1]) ** 2 + SIGMA_DATA**2).sqrt()
        return self.net.encode((c_in * noisy).to(self.dtype), *noise_conditioning(sigma, text))[1]


class ShellDenoiser(nn.Module):
    """One octave around a denoiser `below`:

    D(z; sigma) = U D_below(P z; sigma/2) + HP(k_skip z + k_out F), with k_skip = v/(v+sigma^2) and
    k_out = sigma sqrt(v)/sqrt(sigma^2+v), where v is the variance of the high band of real images. With F = 0
    it is the upsampled estimate below plus the Wiener filter of the high band. The high-pass projection of F
    keeps P D = D_below exactly: information flows from low to high only.
    """

    def __init__(
        self, below: "CoreDenoiser | ShellDenoiser", net: ShellNet, high_band_variance: float
    ) -> None:
        super().__init__()
        self.below = below
        self.net = net
        self.resolution: int = 2 * below.resolution
        self.high_band_variance = high_band_variance  # v, per kept dimension
        self.joint = False  # whether the loss of this shell trains the level below as well
        self.logvar = LogVariance()
        self.difficulty = Difficulty(net.feature_channels) if net.regions else None
        self.dtype = torch.float32

    @property
    def feature_channels(self) -> int:
        """Channels of the features handed to the next shell."""
        return self.net.feature_channels

    @property
    def sigma_high_band(self) -> float:
        """Root mean square of the high band of real images."""
        return math.sqrt(self.high_band_variance * 3 / 4)

    def add_octave(
        self,
        noisy: Tensor,
        below: Estimate,
        sigma: Tensor,
        text: Conditioning,
        low_sigma: Tensor | None = None,
    ) -> Estimate:
        """Add the high band to the estimate of the level below. `noisy` [B,3,R,R] has its high band at sigma, its
        low band at `low_sigma`, of the shape of sigma (None: sigma / 2)."""
        s = expand(sigma, noisy.shape[-1])
        return self.octave(
            noisy, below, s, *noise_conditioning(sigma, text), self.band_conditioning(sigma, low_sigma)
        )

    def band_conditioning(self, sigma: Tensor, low_sigma: Tensor | None) -> Tensor | None:
        """Features of the low band's own level; None where it has none, or the network does not take them."""
        return None if low_sigma is None or not self.net.bands else band_features(sigma, low_sigma)

    def octave(
        self,
        noisy: Tensor,
        below: Estimate,
        s: Tensor,
        c_noise: Tensor,
        text: Conditioning,
        regions: Tensor | None,
        bands: Tensor | None,
    ) -> Estimate:
        """`add_octave` for whole images or windows of them [B,3,H,W]: `s` are the levels of their pixels [B,1,H,W],
        or of a shape that broadcasts; c_noise [B], text, regions and bands go to the network as they are."""
        # Preconditioning of the high band.
        v = self.high_band_variance
        k_skip, k_out = v / (v + s**2), s * math.sqrt(v) / (s**2 + v).sqrt()
        c_in = 1 / (s**2 + SIGMA_DATA**2).sqrt()

        # Network, on both resolutions at unit variance.
        x, low = (c_in * noisy).to(self.dtype), (below.denoised / SIGMA_DATA).to(self.dtype)
        out, features = self.net(x, low, below.features.to(self.dtype), c_noise, text, regions, bands)

        # The estimate below, upsampled, plus the high band.
        denoised = upsample(below.denoised) + high_pass(k_skip * noisy + k_out * out.float())  # [B,3,H,W]
        return Estimate(denoised, features)

    def estimate(
        self, noisy: Tensor, sigma: Tensor, text: Conditioning, low_sigma: Tensor | None = None
    ) -> Estimate:
        """Denoise [B,3,R,R] at sigma [B] or [B,1,g,g]; also return the decoder features."""
        below = self.below.estimate(pool(noisy), sigma / 2 if low_sigma is None else low_sigma, text)
        return self.add_octave(noisy, below, sigma, text, low_sigma)

    def forward(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise [B,3,R,R] at sigma [B]."""
        return self.estimate(noisy, sigma, text).denoised

    def assess(
        self,
        images: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        low_sigma: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the high band in units of k_out^2, mean over the kept dimensions of an image [B] or
        of each patch [B,1,g,g], as sigma is; and the decoder features.

        The level below is trained through this loss only if `joint`; else its estimate is detached."""
        below = self.estimate_below(noisy, sigma / 2 if low_sigma is None else low_sigma, text)
        estimate = self.add_octave(noisy, below, sigma, text, low_sigma)
        return self.high_error(estimate.denoised, images, sigma), estimate.features

    def estimate_below(self, noisy: Tensor, low_sigma: Tensor, text: Conditioning) -> Estimate:
        """The estimate of the level below as the loss uses it, for images [B,3,R,R]: detached unless `joint`."""
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            return self.below.estimate(pool(noisy), low_sigma, text)

    def high_error(self, denoised: Tensor, images: Tensor, sigma: Tensor) -> Tensor:
        """Squared error of the high band of [B,3,H,W], as in `assess`."""
        residual = high_pass(denoised - images)
        weight = (sigma**2 + self.high_band_variance) / (sigma**2 * self.high_band_variance)
        return weight * mean_square(residual, sigma) * (4 / 3)

    def error(self, images: Tensor, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The error of `assess`."""
        return self.assess(images, noisy, sigma, text)[0]

    def expected_error(self, sigma: Tensor) -> Tensor:
        """E|x - D|^2 per dimension that the levels have learned to expect at sigma [B], low band and high: [B]."""
        v = self.high_band_variance
        high = self.logvar(sigma).exp() * sigma**2 * v / (sigma**2 + v)
        return self.below.expected_error(sigma / 2) + 3 / 4 * high


Denoiser = CoreDenoiser | ShellDenoiser


def pyramid_levels(denoiser: Denoiser) -> list[Denoiser]:
    """The nested denoisers from the core to the finest shell."""
    return [denoiser] if isinstance(denoiser, CoreDenoiser) else [*pyramid_levels(denoiser.below), denoiser]


def set_dtype(denoiser: Denoiser, dtype: torch.dtype) -> None:
    """Choose the precision of the raw networks (float32 or bfloat16)."""
    for level in pyramid_levels(denoiser):
        level.dtype = dtype


def set_recompute(denoiser: Denoiser, recompute: bool) -> None:
    """Whether blocks compute their activations again in the backward pass: less memory, more time, same bits."""
    for block in denoiser.modules():
        if isinstance(block, Block):
            block.recompute = recompute


def build_core(resolution: int, text_dim: int, net: Mapping[str, Any]) -> CoreDenoiser:
    """Build a core; `net` holds the keyword values of `UNet` (patch, channels, ...)."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in net.items()}
    return CoreDenoiser(UNet(resolution, text_dim, **options), resolution)


def build_shell(
    below: Denoiser, text_dim: int, high_band_variance: float, net: Mapping[str, Any]
) -> ShellDenoiser:
    """Build a shell around `below`; `net` holds the keyword values of `ShellNet` (patch, channels, ...)."""
    return ShellDenoiser(below, ShellNet(text_dim, below.feature_channels, **net), high_band_variance)
