"""The contrast of samples, set to that of real images.

Networks that were trained for a mean squared error, and averages of weights, lack a few percent of it. And what
grain there is on white is cut off on one side by the range of pixels, which takes contrast as well. One factor of
all samples mends both.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.models.shape import Images, by_size
from pipeline.models.statistics import Statistics

MAX_FACTOR = 1.2  # and its inverse: contrast that is further off is wrong in other ways, and left as it is
TOGETHER = 16  # images, so that what is computed with them fits a cache, and takes no memory
HALVINGS = 30  # of the interval of factors, to the precision of float32


def match_contrast(samples: Images, real: Images, statistics: Statistics) -> float:
    """The factor of standardised samples that gives them, in the range of pixels, the power of the real images.

    samples, real: uint8 images, any number of each. Power is the mean square of standardised pixels, so it is of
    what differs from the mean colour of the data. Returns 1 where no factor within MAX_FACTOR does."""
    parts = [few for _, alike in by_size(samples) for few in statistics.standardise(alike).split(TOGETHER)]
    wanted = power(statistics.standardise(alike) for _, alike in by_size(real))

    def reached(factor: float) -> bool:
        return power(statistics.clip(factor * part) for part in parts) >= wanted

    low, high = 1 / MAX_FACTOR, MAX_FACTOR
    if reached(low) or not reached(high):
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return (low + high) / 2


def power(parts: Iterable[Tensor]) -> float:
    """Mean square of all values [n,3,H,W] of some sizes."""
    total, count = 0.0, 0
    for part in parts:
        total += float(part.square().sum(dtype=torch.float64))
        count += part.numel()
    return total / count
