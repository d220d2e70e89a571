"""Relativistic adversarial losses with finite-difference gradient penalties.

RpGAN with R1 and R2 (R3GAN, arXiv 2501.05441), where the penalties compare the logits of an image and of the
image with a little noise (APT, arXiv 2501.08316), so that no second derivatives are needed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(fake) - D(real))), mean over pairs of logits [B]."""
    return F.softplus(real - fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(real) - D(fake))), mean over pairs of logits [B]."""
    return F.softplus(fake - real).mean()


def difference_penalty(logits: Tensor, perturbed: Tensor, weight: float, std: float) -> Tensor:
    """(weight / std^2) (D(x) - D(x + std n))^2, mean over [B]: `weight` is lambda s^2."""
    return weight / std**2 * (logits - perturbed).square().mean()


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
