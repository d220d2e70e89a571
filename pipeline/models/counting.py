"""What networks take: parameters, float operations by torch's own counter, and memory of a GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import artifacts

GPU_MEMORY = "gpu_memory.json"  # in a run folder: most bytes that the first worker reserved on its GPU


def flops(work: Callable[[], Any]) -> int:
    """Float operations of the convolutions and matrix products of `work`, forward and backward, products and sums
    each counted; attention as plain products."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def count_parameters(module: nn.Module) -> int:
    """Numbers that the module holds as parameters."""
    return sum(p.numel() for p in module.parameters())


def note_gpu_memory(folder: Path, device: str | torch.device) -> None:
    """Write GPU_MEMORY of this process to a run folder; nothing where it computes on the CPU."""
    if torch.device(device).type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        artifacts.write_atomic(folder / GPU_MEMORY, json.dumps(peak))
