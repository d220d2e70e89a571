"""Guidance within an interval of noise levels (Kynkaanniemi et al., arXiv 2404.07724): a denoiser is led away from
the estimate of a worse one, its guide.

The guide is the denoiser without its caption (classifier-free; Ho & Salimans, arXiv 2207.12598), its own weights
from early in training (autoguidance; Karras et al., arXiv 2406.02507), or the estimate of the level below,
enlarged, which every estimate of a shell contains and which therefore costs no call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import CoreDenoiser, Denoiser, ShellDenoiser
from pipeline.models.resample import high_pass, pool, upsample

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
GuidedEstimates = tuple[Tensor, Tensor, int]  # estimate [B,3,R,R], the guide's, calls that both took
Guide = Callable[[Denoise, Tensor, Tensor, Conditioning], GuidedEstimates]

GUIDES = ("no_text", "early", "low")


def without_text(denoiser: Denoise, noisy: Tensor, sigma: Tensor, text: Conditioning) -> GuidedEstimates:
    """Guide without captions; the two halves run as one batch and count as two calls."""
    second = torch.arange(2 * len(noisy), device=noisy.device) >= len(noisy)
    both = text.twice().without(second)
    estimate, away = denoiser(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
    return estimate, away, 2


def low_band(denoiser: Denoise, noisy: Tensor, sigma: Tensor, text: Conditioning) -> GuidedEstimates:
    """Guide by the level below: `U D_below(P z) = U P D(z)` for a shell, so that one call serves both."""
    estimate = denoiser(noisy, sigma, text)
    return estimate, upsample(pool(estimate)), 1


def early_estimate(
    early: Denoiser, denoiser: Denoiser, noisy: Tensor, sigma: Tensor, text: Conditioning
) -> Tensor:
    """Estimate [B,3,R,R] of the early weights of `denoiser`: of its core, and of each shell around the finished
    level below, on which it was trained. So guided shells, too, keep the guided estimate below: P D_w = D_w P."""
    if isinstance(denoiser, CoreDenoiser):
        return early(noisy, sigma, text)
    assert isinstance(early, ShellDenoiser)
    low = pool(noisy), sigma / 2, text
    octave = early.add_octave(noisy, denoiser.below.estimate(*low), sigma, text).denoised
    return upsample(early_estimate(early.below, denoiser.below, *low)) + high_pass(octave)


def guide_of(name: str, denoiser: Denoiser, early: Denoiser | None) -> Guide:
    """The guide called `name`, one of GUIDES, for one level of a pyramid and the same level with early weights.

    A core has no level below: where shells are guided by `low`, it is guided by `no_text`."""
    if name == "early":
        assert early is not None

        def by_early(denoise: Denoise, noisy: Tensor, sigma: Tensor, text: Conditioning) -> GuidedEstimates:
            away = early_estimate(early, denoiser, noisy, sigma, text)
            return denoise(noisy, sigma, text), away, 2

        return by_early
    return low_band if name == "low" and isinstance(denoiser, ShellDenoiser) else without_text


class Guided:
    """A denoiser guided away from the estimate of `guide`; counts its calls (`nfe`).

    D_w = D_guide + w (D - D_guide) where `interval` holds sigma * scale (the level as the core sees it);
    elsewhere, and for w = 1, plain D.
    """

    def __init__(
        self,
        denoiser: Denoise,
        weight: float,
        interval: tuple[float, float],
        scale: float = 1.0,
        guide: Guide = without_text,
    ) -> None:
        self.denoiser = denoiser
        self.weight = weight
        self.interval = interval
        self.scale = scale
        self.guide = guide
        self.nfe = 0

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise [B,3,R,R]; all of sigma [B] must be equal."""
        level = float(sigma[0]) * self.scale
        if self.weight == 1 or not self.interval[0] <= level <= self.interval[1]:
            self.nfe += 1
            return self.denoiser(noisy, sigma, text)
        estimate, away, calls = self.guide(self.denoiser, noisy, sigma, text)
        self.nfe += calls
        return away + self.weight * (estimate - away)
