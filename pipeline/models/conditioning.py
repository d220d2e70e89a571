"""What a denoiser is conditioned on: captions, augmentation labels, and noise levels.

Levels that differ by region or between bands reach the networks as a few sines of their logarithm, relative to
the level of the image (`region_features`)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """Encoded captions and, in training, augmentation labels of a batch of B images (T tokens, D numbers each).

    A row whose mask is False everywhere has no caption; labels of 0 (or None) mean "not augmented"."""

    pooled: Tensor  # float32 [B, D]
    tokens: Tensor  # float32 [B, T, D]
    mask: Tensor  # bool [B, T]
    augment: Tensor | None = None  # float32 [B, A], see pipeline.data.augment

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        augment = None if self.augment is None else change(self.augment)
        return Conditioning(change(self.pooled), change(self.tokens), change(self.mask), augment)

    def select(self, rows: Tensor | slice) -> "Conditioning":
        """Some rows of the batch."""
        return self._each(lambda t: t[rows])

    def to(self, device: str | torch.device) -> "Conditioning":
        """Move to a device."""
        return self._each(lambda t: t.to(device))

    def float(self) -> "Conditioning":
        """As float32; prepared texts are stored as float16."""
        return self._replace(pooled=self.pooled.float(), tokens=self.tokens.float())

    def doubled(self) -> "Conditioning":
        """The batch followed by itself: [2B] rows."""
        return self._each(lambda t: torch.cat([t, t]))

    def drop_captions(self, rows: Tensor | None = None) -> "Conditioning":
        """Without the captions of `rows` (bool [B]; None: of all)."""
        mask = torch.zeros_like(self.mask) if rows is None else self.mask & ~rows[:, None]
        return self._replace(mask=mask)


class NoiseConditioning(NamedTuple):
    """The noise level as the blocks of one network see it."""

    emb: Tensor  # float32 [B,E], with caption and augmentation
    c_noise: Tensor  # float32 [B], ln(sigma) / 4 of the image as a whole
    # Features of how far the level of each patch (float32 [B,4,g,g]), or of the low band ([B,4,g,g] or
    # [B,4,1,1]), is from the image's; None: it is the same.
    regions: Tensor | None = None
    bands: Tensor | None = None


REGION_RANGE = 4.0  # |ln(sigma of a patch / sigma of the image)|, maximum
BAND_RANGE = 6.0  # |ln(2 sigma_low / sigma)|, maximum
REGION_FEATURES = 4


def region_features(relative: Tensor, limit: float = REGION_RANGE) -> Tensor:
    """phi(r) = sin(2^k pi r / (2 limit)), k = 0..3: relative log levels [B,1,g,g], clipped to +-limit, to
    [B,4,g,g]. Zero where r is, so that layers without bias do nothing to an image of one level."""
    r = relative.float().clamp(-limit, limit) * (math.pi / (2 * limit))
    return torch.cat([(2**k * r).sin() for k in range(REGION_FEATURES)], dim=1)


def split_level(sigma: Tensor) -> tuple[Tensor, Tensor | None]:
    """sigma as network inputs: (c_noise [B], phi [B,4,g,g]), or (c_noise, None) for sigma [B].

    c_noise is a quarter of the mean of l = ln sigma, computed as l0 + mean(l - l0) with l0 of the first patch,
    which is exact for maps of one level; phi are features of l minus that mean."""
    if sigma.ndim == 1:
        return sigma.log() / 4, None
    first = sigma[:, 0, 0, 0].contiguous()
    relative = (sigma / first[:, None, None, None]).log()
    mean = relative.mean(dim=(1, 2, 3))
    return (first.log() + mean) / 4, region_features(relative - mean[:, None, None, None])


def band_features(sigma: Tensor, low_sigma: Tensor) -> Tensor:
    """phi(b), b = ln(2 low_sigma / sigma), of levels both [B] or both [B,1,g,g]: [B,4,1,1] or [B,4,g,g]; zero where
    the low band has the level that pooling gives."""
    b = (2 * low_sigma / sigma).log()
    return region_features(b[:, None, None, None] if b.ndim == 1 else b, BAND_RANGE)


def noise_conditioning(sigma: Tensor, text: Conditioning) -> tuple[Tensor, Conditioning, Tensor | None]:
    """(c_noise, text, regions): the conditioning arguments of a network, in their order."""
    c_noise, regions = split_level(sigma)
    return c_noise, text, regions
