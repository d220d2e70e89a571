"""Nothing that is not finite is stored: tensors and metrics are checked before a commit."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import StorageError


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A finite sum has finite terms, and reads the tensor once; a sum that is not may just be too large.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def require_finite(tensors: Mapping[str, Tensor], where: str, fix: str) -> None:
    """Raise StorageError, naming the first tensor that holds a NaN or an infinity, if any."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            problem = f"{bad} of {tensor.numel()} values of tensor {name} are not finite"
            raise StorageError("E-IO-023", where, problem, fix)


def require_finite_metrics(metrics: Mapping[str, float], where: str, fix: str) -> None:
    """Raise StorageError, naming the first metric that is NaN or infinite, if any."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise StorageError("E-IO-023", where, f"{name} is {value}, which is not finite", fix)
