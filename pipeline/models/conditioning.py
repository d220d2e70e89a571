"""TODO pipeline/models/conditioning.py"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """What an image is conditioned on: encoded captions, and in training how it was augmented.

    A row whose mask is False everywhere means "no caption"; labels of 0 (or None) mean "not augmented"."""

    pooled: Tensor  # float32 [B, D]
    tokens: Tensor  # float32 [B, T, D]
    mask: Tensor  # bool [B, T]
    augment: Tensor | None = None  # float32 [B, A], see pipeline.data.augment

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        augment = None if self.augment is None else change(self.augment)
        return Conditioning(change(self.pooled), change(self.tokens), change(self.mask), augment)

    def select(self, rows: Tensor | slice) -> "Conditioning":
        """Return the captions of some rows."""
        return self._each(lambda t: t[rows])

    def to(self, device: str | torch.device) -> "Conditioning":
        """Move to a device."""
        return self._each(lambda t: t.to(device))

    def float(self) -> "Conditioning":
        """As float32; prepared texts are stored as float16."""
        return self._replace(pooled=self.pooled.float(), tokens=self.tokens.float())

    def twice(self) -> "Conditioning":
        """The same batch again behind itself."""
        return self._each(lambda t: torch.cat([t, t]))

    def without(self, dropped: Tensor) -> "Conditioning":
        """Forget the captions where `dropped` (bool [B]) is True."""
        return self._replace(mask=self.mask & ~dropped[:, None])


class NoiseConditioning(NamedTuple):
    """The noise level as the blocks of one network see it."""

    emb: Tensor  # float32 [B,E], with caption and augmentation
    c_noise: Tensor  # float32 [B], ln(sigma) / 4 of the image as a whole
    regions: Tensor | None = (
        None  # float32 [B,4,g,g], how far each patch is above or below it; None: not at all
    )
    bands: Tensor | None = None  # float32 [B,4,g,g] or [B,4,1,1], how far the low band is; None: not at all


REGION_RANGE = 4.0  # of ln S of a patch, above or below the image's level
BAND_RANGE = 6.0  # of ln 2 S_low / S, the low band's level above or below that of the high band
REGION_FEATURES = 4


def region_features(relative: Tensor, reach: float = REGION_RANGE) -> Tensor:
    """phi(r) = sin(2^k pi r / (2 reach)), k = 0..3: relative levels [B,1,g,g], clipped to +-reach, to [B,4,g,g].
    Zero where r is, so that layers without bias do nothing to an image of one level."""
    r = relative.float().clamp(-reach, reach) * (math.pi / (2 * reach))
    return torch.cat([(2**k * r).sin() for k in range(REGION_FEATURES)], dim=1)
