"""Classifier-free guidance within an interval of noise levels (Ho & Salimans, arXiv 2207.12598; the interval:
Kynkaanniemi et al., arXiv 2404.07724)."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.layers import Text

Denoise = Callable[[Tensor, Tensor, Text], Tensor]


class Guided:
    """A denoiser guided away from its captionless estimate; counts its calls (`nfe`).

    D_w = D(null) + w (D(text) - D(null)) where `interval` holds sigma * scale (the level as the core sees
    it); elsewhere, and for w = 1, plain D(text). The two halves run as one batch and count as two calls.
    """

    def __init__(
        self, denoiser: Denoise, weight: float, interval: tuple[float, float], scale: float = 1.0
    ) -> None:
        self.denoiser = denoiser
        self.weight = weight
        self.interval = interval
        self.scale = scale
        self.nfe = 0

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """Denoise [B,3,R,R]; all of sigma [B] must be equal."""
        level = float(sigma[0]) * self.scale
        if self.weight == 1 or not self.interval[0] <= level <= self.interval[1]:
            self.nfe += 1
            return self.denoiser(noisy, sigma, text)
        self.nfe += 2
        second = torch.arange(2 * len(noisy), device=noisy.device) >= len(noisy)
        both = text.twice().without(second)
        with_text, without = self.denoiser(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return without + self.weight * (with_text - without)
