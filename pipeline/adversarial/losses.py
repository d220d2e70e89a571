"""Relativistic adversarial losses with finite-difference gradient penalties.

RpGAN with R1 and R2 (R3GAN, arXiv 2501.05441), where the penalties compare the logits of an image and of the
image with a little noise (APT, arXiv 2501.08316), so that no second derivatives are needed. Beside them a
distance of marginal distributions, which sees what discriminators on normalised features hardly do: contrast,
sharpness, and faint noise on even areas.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.resample import high_pass, pool

COARSEST = 4  # px, of the images whose high band is the last in `marginal_distance`
SPREAD_FLOOR = 0.02  # added to the standard deviation of real values, which even images do not have


def generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(fake) - D(real))), mean over pairs of logits [B]."""
    return F.softplus(real - fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(real) - D(fake))), mean over pairs of logits [B]."""
    return F.softplus(fake - real).mean()


def difference_penalty(logits: Tensor, perturbed: Tensor, weight: float, std: float) -> Tensor:
    """(weight / std^2) (D(x) - D(x + std n))^2, mean over [B]: `weight` is lambda s^2."""
    return weight / std**2 * (logits - perturbed).square().mean()


def marginal_distance(fake: Tensor, real: Tensor) -> Tensor:
    """How far the values of the images [B,3,H,W], and those of the high band of each octave down to 4 px or an odd
    side, are distributed from the real ones: the mean of 1-D Wasserstein distances over standard deviations.

    Each distribution is that of one channel and band over the whole batch: nothing says where in an image a value
    belongs. As the sliced distance on Laplacian pyramids (Karras et al., arXiv 1710.10196), for single pixels; the
    marginals of a pyramid as a description of images: Heeger and Bergen, SIGGRAPH 1995."""
    distances = [_wasserstein(fake, real)]
    while min(fake.shape[2:]) >= COARSEST and not any(side % 2 for side in fake.shape[2:]):
        distances.append(_wasserstein(high_pass(fake), high_pass(real)))
        fake, real = pool(fake), pool(real)
    return torch.stack(distances).mean()


def _wasserstein(fake: Tensor, real: Tensor) -> Tensor:
    """Mean distance of sorted values per channel of [B,C,H,W], over the real ones' standard deviation."""
    a, b = (x.transpose(0, 1).flatten(1).sort(dim=1, stable=True).values for x in (fake, real))
    return ((a - b).abs().mean(dim=1) / (b.std(dim=1) + SPREAD_FLOOR)).mean()


def kernel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of features [n,d] and [m,d] with a cubic polynomial kernel (as in
    KID, arXiv 1801.01401, but on any features), in float64."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.t() / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * kernel(x, y).mean()


def mean_pairwise_distance(features: Tensor) -> Tensor:
    """Mean distance between different rows of [n,d]: a measure of variety, which drops if a generator collapses."""
    n = len(features)
    return torch.cdist(features, features).sum() / (n * (n - 1))
