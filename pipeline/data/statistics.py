"""Statistics of the training images: mean and standard deviation per channel, and the variance of high bands.

Computed in constant memory, in float64.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.dataset import PreparedDataset
from pipeline.models.resample import high_pass, pool, rescale
from pipeline.models.statistics import Statistics


def chunks(dataset: PreparedDataset, size: int = 1024) -> Iterator[NDArray[np.int64]]:
    """Training rows in chunks of `size`, of one bucket each, so that a data set of any size is measured in constant
    memory."""
    rows = dataset.split("train")
    for own in dataset.by_bucket(rows):
        yield from (rows[own[start : start + size]] for start in range(0, len(own), size))


def measure_statistics(dataset: PreparedDataset, resolution: int) -> Statistics:
    """Mean and standard deviation per channel of the training images' box means at `resolution`."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for rows in chunks(dataset):
        x = rescale(dataset.low_images(rows).double() / 127.5 - 1, resolution)
        total += x.sum(dim=(0, 2, 3))
        squares += x.square().sum(dim=(0, 2, 3))
        count += x[:, 0].numel()
    mean = total / count
    std = ((squares - count * mean.square()) / max(count - 1, 1)).clamp_min(0).sqrt().clamp_min(1e-3)
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))


def high_band_variances(
    dataset: PreparedDataset, statistics: Statistics, resolutions: Sequence[int]
) -> dict[int, float]:
    """Variance per dimension of the high band of the standardised training images, at some resolutions: 4/3 of the
    mean square of HP x, since the high band has 3/4 of the dimensions."""
    totals, counts = dict.fromkeys(resolutions, 0.0), dict.fromkeys(resolutions, 0)
    for rows in chunks(dataset):
        x, level = statistics.standardise(dataset.images(rows)), dataset.resolution
        while level >= min(resolutions):
            if level in totals:
                high = high_pass(x).double()
                totals[level] += float(high.square().sum())
                counts[level] += high.numel()
            x, level = pool(x), level // 2
    return {resolution: totals[resolution] / counts[resolution] * 4 / 3 for resolution in resolutions}
