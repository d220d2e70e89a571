"""Power-function averages of the weights (Karras et al., arXiv 2312.02696, section 3).

Their length grows with training, so that short and long runs use the same setting. Averages stored during training
can be combined afterwards into one of another length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Profile(NamedTuple):
    """A power-function average: weight p(t) = (gamma + 1) t^gamma / nimg^(gamma + 1) of the training weights at
    image t <= nimg (2312.02696, section 3)."""

    std: float  # relative width, which fixes gamma
    nimg: float  # where it ends


def gamma_of_std(std: float) -> float:
    """Exponent gamma of the power profile whose relative width is `std` (2312.02696, algorithm 2).

    Solves (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2."""
    t = std**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_decay(std: float, nimg: int, batch_size: int) -> float:
    """Weight kept of the old average when training moves from nimg to nimg + batch_size (eq. 127)."""
    return float((nimg / (nimg + batch_size)) ** (gamma_of_std(std) + 1))


def halflife_decay(halflife_nimg: float, nimg: int, batch_size: int) -> float:
    """Weight kept of the old average with a fixed half-life in images, shorter at the start (cap nimg / 5)."""
    halflife = min(halflife_nimg, max(nimg, 1) / 5)
    return float(0.5 ** (batch_size / halflife))


def profile_product(a: Profile, b: Profile) -> float:
    """Inner product: the integral of p_a(t) p_b(t) over t, in 1/images."""
    gamma_a, gamma_b = gamma_of_std(a.std), gamma_of_std(b.std)
    end = min(a.nimg, b.nimg)
    rise = (end / a.nimg) ** gamma_a * (end / b.nimg) ** gamma_b
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * rise * end / (a.nimg * b.nimg)


def mixing_weights(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Factors [len(stored)] of the combination of stored averages that is nearest to the wanted one in least
    squares, and the norm of the rest of its profile, relative to that of the profile: 0 if it is stored, 1 if
    nothing fits.

    Unlike the paper's, the factors must sum to 1: weights change little compared to their size, so that a sum
    slightly off 1 would cost more than it gains."""
    gram = np.array([[profile_product(a, b) for b in stored] for a in stored])
    target = np.array([profile_product(a, wanted) for a in stored])
    scale = np.sqrt(np.diag(gram))  # unit profiles are better conditioned
    n, norm = len(stored), profile_product(wanted, wanted)
    system = np.zeros((n + 1, n + 1))  # of the factors and the constraint's multiplier
    system[:n, :n] = gram / np.outer(scale, scale)
    system[n, :n] = system[:n, n] = scale.min() / scale
    solution = np.linalg.lstsq(system, np.append(target / scale, scale.min()), rcond=1e-13)[0]
    factors = solution[:n] / scale
    missed = (norm - 2 * factors @ target + factors @ gram @ factors) / norm
    return factors, float(np.sqrt(max(missed, 0.0)))
