"""Does an image show what its caption says? A ridge regression from image features to the caption's vector.

It is fitted on real training images only. An image then retrieves, among all captions of its split, the one whose
vector has the largest cosine similarity with the vector predicted for the image. Real images are scored beside the
samples: they show the best that this judge can do. Real training images are judged by a regression that has not
seen their family (5 folds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.features import Standardiser
from pipeline.evaluation.metrics import Float64, Metric, enough
from pipeline.evaluation.statistics import Int64, number_families

LAMBDAS = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
FOLDS = 5


@dataclass(frozen=True)
class Judge:
    """A fitted regression, and its out-of-fold predictions for the real images it was fitted on."""

    features: Standardiser
    vectors: Standardiser
    weights: Float64  # [d, e]
    ridge: float
    out_of_fold: Float64  # [n, e]

    @classmethod
    def fit(cls, features: Float64, vectors: Float64, families: Sequence[str]) -> Judge:
        """Fit features [n,d] to caption vectors [n,e], with the ridge of the best out-of-fold cosine similarity.

        Closed form in the n samples: W = X^T (X X^T + ridge I)^-1 Y."""
        scale_features, scale_vectors = Standardiser.fit(features), Standardiser.fit(vectors)
        x, y = scale_features(features), scale_vectors(vectors)
        gram = x @ x.T
        (family,), num_families = number_families(families)
        fold = np.random.default_rng(0).permutation(num_families)[family] % min(FOLDS, max(num_families, 2))
        trials = [(_out_of_fold(gram, y, fold, ridge), ridge) for ridge in LAMBDAS]
        predicted, ridge = max(
            trials, key=lambda trial: float((_normalise(trial[0]) * _normalise(y)).sum(1).mean())
        )
        weights = x.T @ np.linalg.solve(gram + ridge * np.eye(len(x)), y)
        return cls(scale_features, scale_vectors, weights, ridge, predicted)

    def predict(self, features: Float64) -> Float64:
        """Predicted standardised caption vectors [n,e] of features [n,d]."""
        predicted: Float64 = self.features(features) @ self.weights
        return predicted


def _out_of_fold(gram: Float64, y: Float64, fold: Int64, ridge: float) -> Float64:
    predicted = np.zeros_like(y)
    for number in np.unique(fold):
        out, kept = fold == number, fold != number
        if kept.any():
            dual = np.linalg.solve(gram[np.ix_(kept, kept)] + ridge * np.eye(int(kept.sum())), y[kept])
            predicted[out] = gram[np.ix_(out, kept)] @ dual
    return predicted


def _normalise(x: Float64) -> Float64:
    normalised: Float64 = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return normalised


def top_k(predicted: Float64, candidates: Float64, truth: Int64, k: int) -> Metric:
    """Fraction of predictions [n,e] whose true candidate (its row in candidates [c,e]) is among the k of largest
    cosine similarity."""
    n = len(predicted)
    if not enough("retrieval", n, len(candidates)):
        return Metric.refused("retrieval", min(n, len(candidates)))
    cosine = _normalise(predicted) @ _normalise(candidates).T
    of_truth = cosine[np.arange(n), truth][:, None]
    return Metric(float(((cosine > of_truth).sum(1) < k).mean()), n)


def caption_rank(predicted: Float64, candidates: Float64, truth: Int64) -> Float64:
    """Fraction of the other candidates [c,e] that are less similar to each prediction [n,e] than its true one, ties
    counted as a half: float64 [n]; 1 where the caption is retrieved first, 1/2 on average for shuffled captions."""
    cosine = _normalise(predicted) @ _normalise(candidates).T
    of_truth = cosine[np.arange(len(predicted)), truth][:, None]
    others = max(len(candidates) - 1, 1)
    rank: Float64 = ((cosine < of_truth).sum(1) + 0.5 * ((cosine == of_truth).sum(1) - 1)) / others
    return rank
