"""KID, FD, precision and recall equal those of torch-fidelity and torchmetrics on the same features.

Theirs differ from ours by definition in two ways, which these tests take out: their KID is a mean over random
subsets of equal size (here one subset of everything), and their balls include the border (none is on it here)."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.evaluation import metrics

RTOL = 1e-4
SIZES = [(120, 120, 16), (300, 300, 64)]


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated, skewed, not centred."""
    rng = np.random.default_rng([seed, n])
    mixing = np.random.default_rng(7).normal(size=(d, d)) / d**0.5
    return np.exp(0.4 * rng.normal(size=(n, d))) @ mixing + shift


class Given(nn.Module):
    """An extractor of torchmetrics that hands on `features`: the pixels of an image are its number."""

    def __init__(self, features: np.ndarray) -> None:
        super().__init__()
        self.features = torch.from_numpy(features)
        self.num_features = features.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.features[images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0].long()]


def update(metric: Any, n: int, m: int) -> float:
    """A torchmetrics metric of its extractor's first n features as real ones, and of the m next as fake ones."""
    numbers = torch.arange(n + m)
    images = torch.stack([numbers // 256, numbers % 256, numbers * 0], 1)[:, :, None, None].to(torch.uint8)
    metric.update(images[:n], real=True)
    metric.update(images[n:], real=False)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_kid(n: int, m: int, d: int) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = features(n, d, 0), features(m, d, 1, shift=0.2)
    ours = metrics.kid(real, fake)
    theirs = kid_features_to_metric(
        torch.from_numpy(real), torch.from_numpy(fake), kid_subsets=1, kid_subset_size=n, verbose=False
    )
    assert theirs["kernel_inception_distance_mean"] == pytest.approx(ours, rel=RTOL)
    metric = KernelInceptionDistance(Given(np.concatenate([real, fake])), subsets=1, subset_size=n)
    assert update(metric, n, m) == pytest.approx(ours, rel=RTOL)


@pytest.mark.parametrize(("n", "m", "d"), [*SIZES, (90, 200, 16), (60, 80, 64)])
def test_frechet_distance(n: int, m: int, d: int) -> None:
    """Also for sets of different size, and for fewer samples than features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = features(n, d, 0), features(m, d, 1, shift=0.2)
    ours = metrics.frechet_distance(real, fake)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (real, fake)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert theirs == pytest.approx(ours, rel=RTOL)
    metric = FrechetInceptionDistance(Given(np.concatenate([real, fake]))).set_dtype(torch.float64)
    assert update(metric, n, m) == pytest.approx(ours, rel=RTOL)


@pytest.mark.parametrize(("n", "m", "d"), [*SIZES, (90, 200, 16)])
@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(n: int, m: int, d: int, k: int) -> None:
    """torch-fidelity takes the generated set first. torchmetrics has neither."""
    real, fake = features(n, d, 0), features(m, d, 1, shift=0.1)
    ours = metrics.prdc(real, fake, k)
    theirs = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=k, verbose=False
    )
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1
    assert theirs["precision"] == pytest.approx(ours["precision"], rel=RTOL)
    assert theirs["recall"] == pytest.approx(ours["recall"], rel=RTOL)
