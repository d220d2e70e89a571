"""Features of a random convolutional network, and the kernel distance in them.

Nothing was trained, so no discriminator can have seen it; it sees texture, edges and coarse layout.
"""

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adversarial.losses import kernel_distance
from pipeline.adversarial.whitening import Whitening
from pipeline.models.shape import Images, by_size

Float64 = NDArray[np.float64]
CACHED = 4  # images whose feature maps stay in a CPU's cache: half the time of 64 at 128 px


class RandomFeatures:
    """A random network for images of `resolution` px: a 5x5 convolution, then 3x3 ones after each halving.

    The last stage of square images has 8 px. Filters have unit norm (three quarters of the first ones zero mean, so
    that they detect edges), biases are random, activations leaky ReLU. Features are the mean and standard deviation
    over space of every channel of every stage: 512 at 64 px. Drawn by numpy's PCG64, whose stream is stable over
    versions."""

    def __init__(self, resolution: int, seed: int = 0, device: str = "cpu") -> None:
        num_stages = max(int(np.log2(resolution / 8)) + 1, 1)
        channels = [(32, 64, 80)[min(stage, 2)] for stage in range(num_stages)]
        rng = np.random.Generator(np.random.PCG64(seed))
        sha256 = hashlib.sha256()
        self.weights: list[tuple[Tensor, Tensor]] = []
        fan_in = 3
        for stage, width in enumerate(channels):
            size = 3 if stage else 5
            kernel = rng.standard_normal((width, fan_in, size, size))
            if stage == 0:
                kernel[: width * 3 // 4] -= kernel[: width * 3 // 4].mean((2, 3), keepdims=True)
            kernel /= np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True))
            kernel *= np.sqrt(2) if stage else 1.0  # He initialisation
            bias = 0.5 * rng.standard_normal(width)
            for array in (kernel, bias):
                sha256.update(array.astype("<f4").tobytes())
            self.weights.append((_to_float32(kernel, device), _to_float32(bias, device)))
            fan_in = width
        self.dim = 2 * sum(channels)
        self.sha256 = sha256.hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B,dim] of float32 images [B,3,H,W] in 0..255."""
        together = CACHED if images.device.type == "cpu" else max(len(images), 1)
        return torch.cat([self._features(few) for few in images.split(together)])

    def _features(self, images: Tensor) -> Tensor:
        x = (images - 127.5) / 63.75
        features = []
        for stage, (kernel, bias) in enumerate(self.weights):
            if stage:
                x = F.avg_pool2d(x, 2)
            x = F.pad(x, [kernel.shape[-1] // 2] * 4, mode="replicate")
            x = F.leaky_relu(F.conv2d(x, kernel, bias), 0.2)  # [B, width, R / 2^stage, R / 2^stage]
            mean = x.mean((2, 3), keepdim=True)
            root = math.sqrt(x.shape[-2] * x.shape[-1])
            std = torch.linalg.vector_norm(x - mean, dim=(2, 3)) / root  # faster than Tensor.std
            features += [mean[:, :, 0, 0], std]
        return torch.cat(features, 1)


def _to_float32(array: Float64, device: str) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)


class RandomDistance:
    """Kernel distance (KID) from some real images, uint8, in random features that they whiten."""

    def __init__(self, real: Images, resolution: int | None = None) -> None:
        """`resolution` of the images, px; None: they are square."""
        # Another network than the evaluation judges by.
        self.network = RandomFeatures(resolution or real[0].shape[-1], seed=1)
        features = self.features(real)
        self.whitening = Whitening.fit(features)
        self.real = torch.from_numpy(self.whitening(features))

    def features(self, images: Images) -> Float64:
        """Raw features of uint8 images: float64 [n,d]."""
        features = np.zeros((len(images), self.network.dim))
        with torch.inference_mode():
            for places, alike in by_size(images):
                batches = [self.network(batch.float()).double() for batch in alike.split(64)]
                features[places] = torch.cat(batches).numpy()
        return features

    def paired(self, images: Images, originals: Images) -> float:
        """Mean squared difference of whitened features of uint8 images and of what each should be."""
        a, b = (self.whitening(self.features(each)) for each in (images, originals))
        return float(((a - b) ** 2).mean())

    def __call__(self, images: Images) -> float:
        """The distance of other uint8 images, on the CPU."""
        fake = torch.from_numpy(self.whitening(self.features(images)))
        return float(kernel_distance(self.real, fake))
