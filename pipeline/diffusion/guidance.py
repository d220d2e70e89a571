"""Guidance: extrapolate from the estimate of a worse denoiser, the guide, through that of the denoiser.

Three guides: the denoiser without captions (classifier-free guidance; Ho & Salimans, arXiv 2207.12598), its own
weights from early in training (autoguidance; Karras et al., arXiv 2406.02507), or the upsampled estimate of the
level below, which every estimate of a shell contains, so that it costs no call. Applied in an interval of noise
levels only (Kynkaanniemi et al., arXiv 2404.07724).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import CoreDenoiser, Denoiser, ShellDenoiser
from pipeline.models.resample import high_pass, pool, upsample

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
GuidedEstimates = tuple[
    Tensor, Tensor, int
]  # of the denoiser and of its guide, [B,3,R,R] each, and the calls for both
Guide = Callable[[Denoise, Tensor, Tensor, Conditioning], GuidedEstimates]

GUIDES = ("unconditional", "early_weights", "low_band")


def without_text(denoiser: Denoise, noisy: Tensor, sigma: Tensor, text: Conditioning) -> GuidedEstimates:
    """The guide without captions; both run as one batch and count as two calls."""
    second = torch.arange(2 * noisy.shape[0], device=noisy.device) >= noisy.shape[0]
    both = text.doubled().drop_captions(second)
    estimate, guide_estimate = denoiser(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
    return estimate, guide_estimate, 2


def low_band(denoiser: Denoise, noisy: Tensor, sigma: Tensor, text: Conditioning) -> GuidedEstimates:
    """The level below as the guide: `U D_below(P z) = U P D(z)` for a shell, so that one call serves both."""
    estimate = denoiser(noisy, sigma, text)
    return estimate, upsample(pool(estimate)), 1


def early_estimate(
    early: Denoiser, denoiser: Denoiser, noisy: Tensor, sigma: Tensor, text: Conditioning
) -> Tensor:
    """Estimate [B,3,R,R] of the early weights of `denoiser`: of its core, and of each shell around the finished
    level below, around which it was trained. So guided shells, too, keep the guided estimate below: P D_w = D_w
    P."""
    if isinstance(denoiser, CoreDenoiser):
        return early(noisy, sigma, text)
    assert isinstance(early, ShellDenoiser)
    low = pool(noisy), sigma / 2, text
    octave = early.add_octave(noisy, denoiser.below.estimate(*low), sigma, text).denoised
    return upsample(early_estimate(early.below, denoiser.below, *low)) + high_pass(octave)


def guide_of(name: str, denoiser: Denoiser, early: Denoiser | None) -> Guide:
    """The guide `name`, one of GUIDES, of one level of a pyramid; `early` is that level with early weights.

    A core has no level below: where shells are guided by `low_band`, it is guided by `unconditional`."""
    if name == "early_weights":
        assert early is not None

        def by_early(denoise: Denoise, noisy: Tensor, sigma: Tensor, text: Conditioning) -> GuidedEstimates:
            guide_estimate = early_estimate(early, denoiser, noisy, sigma, text)
            return denoise(noisy, sigma, text), guide_estimate, 2

        return by_early
    return low_band if name == "low_band" and isinstance(denoiser, ShellDenoiser) else without_text


class Guided:
    """A denoiser with guidance, which counts its calls (`nfe`).

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
        if self.weight == 1 or not self.interval[0] <= float(sigma[0]) * self.scale <= self.interval[1]:
            self.nfe += 1
            return self.denoiser(noisy, sigma, text)
        estimate, guide_estimate, calls = self.guide(self.denoiser, noisy, sigma, text)
        self.nfe += calls
        return guide_estimate + self.weight * (estimate - guide_estimate)
