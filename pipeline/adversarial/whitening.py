"""Features made comparable: standardised, or whitened, by a reference set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

WHITENED_DIM = 64


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
