"""Power-function averages of the weights (arXiv 2312.02696, section 3): their length grows with training, so
a short run and a long one use the same setting."""

import numpy as np


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
