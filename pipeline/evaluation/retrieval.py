"""Does a picture show what its caption says? A ridge regression from image features to the caption's vector.

It is fitted on real training pictures only. A picture then retrieves, among all captions of its split, the
one whose vector has the largest cosine with its own predicted one. The figure beside it is that of the real
pictures: what this judge can do at best. Real training pictures are judged by a regression that has not seen
their base (5 folds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.features import Standardiser
from pipeline.evaluation.metrics import Float64, Metric, enough
from pipeline.evaluation.statistics import Int64, number_units

LAMBDAS = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
FOLDS = 5


@dataclass(frozen=True)
class Judge:
    """A fitted regression, and its out-of-fold predictions for the real pictures it was fitted on."""

    features: Standardiser
    vectors: Standardiser
    weights: Float64  # [d, e]
    ridge: float
    out_of_fold: Float64  # [n, e]

    @classmethod
    def fit(cls, features: Float64, vectors: Float64, bases: Sequence[str]) -> Judge:
        """Fit features [n,d] to caption vectors [n,e]; the ridge with the best out-of-fold cosine is taken.

        Closed form in the n samples: W = X^T (X X^T + ridge I)^-1 Y."""
        by_feature, by_vector = Standardiser.fit(features), Standardiser.fit(vectors)
        x, y = by_feature(features), by_vector(vectors)
        gram = x @ x.T
        (unit,), num_units = number_units(bases)
        fold = np.random.default_rng(0).permutation(num_units)[unit] % min(FOLDS, max(num_units, 2))
        tried = [(_out_of_fold(gram, y, fold, ridge), ridge) for ridge in LAMBDAS]
        predicted, ridge = max(tried, key=lambda each: float((_unit(each[0]) * _unit(y)).sum(1).mean()))
        weights = x.T @ np.linalg.solve(gram + ridge * np.eye(len(x)), y)
        return cls(by_feature, by_vector, weights, ridge, predicted)

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


def _unit(x: Float64) -> Float64:
    unit: Float64 = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit


def top_k(predicted: Float64, candidates: Float64, truth: Int64, k: int) -> Metric:
    """Share of predictions [n,e] whose true candidate (row number in candidates [c,e]) is among the k of
    largest cosine."""
    n = len(predicted)
    if not enough("retrieval", n, len(candidates)):
        return Metric.refused("retrieval", min(n, len(candidates)))
    cosine = _unit(predicted) @ _unit(candidates).T
    of_truth = cosine[np.arange(n), truth][:, None]
    return Metric(float(((cosine > of_truth).sum(1) < k).mean()), n)
