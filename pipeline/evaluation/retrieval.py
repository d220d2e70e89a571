"""Does an image show what its caption says? A ridge regression from image features to the caption's vector.

It is fitted on real training images only. An image then retrieves, among all captions of its split, the one whose
vector has the largest cosine similarity with the vector predicted for the image. Real images are scored beside the
samples: they show the best that this judge can do. Images of a training caption, real or drawn, are judged by a
regression that has not seen its family (5 folds), so that remembering a training image earns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.features import Standardiser
from pipeline.evaluation.metrics import Float64, Metric, enough
from pipeline.evaluation.statistics import Int64, number_families

LAMBDAS = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
FOLDS = 5


@dataclass(frozen=True)
class Judge:
    """A fitted regression, and those without one fold of the families each."""

    features: Standardiser
    vectors: Standardiser
    weights: Float64  # [d, e]
    without_fold: Float64  # [folds, d, e]
    folds: Mapping[str, int]  # by family
    ridge: float

    @classmethod
    def fit(cls, features: Float64, vectors: Float64, families: Sequence[str]) -> Judge:
        """Fit features [n,d] to caption vectors [n,e], with the ridge of the best out-of-fold cosine similarity.

        Closed form in the n samples: W = X^T (X X^T + ridge I)^-1 Y."""
        scale_features, scale_vectors = Standardiser.fit(features), Standardiser.fit(vectors)
        x, y = scale_features(features), scale_vectors(vectors)
        gram = x @ x.T
        (family,), num_families = number_families(families)
        fold = np.random.default_rng(0).permutation(num_families)[family] % min(FOLDS, max(num_families, 2))
        trials = [(_without_folds(gram, y, fold, ridge), ridge) for ridge in LAMBDAS]
        duals, ridge = max(trials, key=lambda trial: _mean_cosine(gram, y, fold, trial[0]))
        return cls(
            scale_features,
            scale_vectors,
            weights=x.T @ np.linalg.solve(gram + ridge * np.eye(len(x)), y),
            without_fold=x.T @ duals,
            folds=dict(zip(families, fold.tolist(), strict=True)),
            ridge=ridge,
        )

    def predict(self, features: Float64, families: Sequence[str] | None = None) -> Float64:
        """Predicted standardised caption vectors [n,e] of features [n,d]; with the families [n] of their captions,
        by the regression that has not seen that family."""
        x = self.features(features)
        predicted: Float64 = x @ self.weights
        folds = np.array([self.folds.get(family, -1) for family in families or ()])
        for number in np.unique(folds[folds >= 0]):
            predicted[folds == number] = x[folds == number] @ self.without_fold[number]
        return predicted


def _without_folds(gram: Float64, y: Float64, fold: Int64, ridge: float) -> Float64:
    """Dual weights [folds,n,e] of regressions without one fold each, 0 in the fold."""
    duals = np.zeros((fold.max() + 1, *y.shape))
    for number, dual in enumerate(duals):
        kept = np.flatnonzero(fold != number)
        if len(kept):
            dual[kept] = np.linalg.solve(gram[np.ix_(kept, kept)] + ridge * np.eye(len(kept)), y[kept])
    return duals


def _mean_cosine(gram: Float64, y: Float64, fold: Int64, duals: Float64) -> float:
    """Mean cosine similarity of y [n,e] and its out-of-fold prediction."""
    predicted = np.empty_like(y)
    for number, dual in enumerate(duals):
        predicted[fold == number] = gram[fold == number] @ dual
    return float((_normalise(predicted) * _normalise(y)).sum(1).mean())


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
