"""Seconds of an update, and the rates at which the device multiplies."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.measure import Run
from benchmarks.train.settings import Setting

started = time.perf_counter()


def log(line: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - started:4.0f} s] {line}", file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds for one of `count`."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / count


def runner(work: Callable[[], object], setting: Setting, gain: float) -> Run:
    """A run of about setting.seconds that returns `gain` per second of one call."""
    seconds_of(work, setting.device, 1)
    count = max(1, round(setting.seconds / seconds_of(work, setting.device, 1)))
    return lambda: gain / seconds_of(work, setting.device, count)


def peaks(setting: Setting) -> dict[str, Run]:
    """Runs of a 3x3 convolution in channels_last and of a product of matrices: FLOP/s."""
    device, dtype = setting.device, setting.dtype
    batch, channels, side, order = (64, 512, 64, 8192) if device.type == "cuda" else (16, 256, 32, 2048)
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    a, b = (torch.randn(order, order, device=device, dtype=dtype) for _ in range(2))
    return {
        "3x3 convolution": runner(lambda: F.conv2d(x, w, padding=1), setting, 18.0 * x.numel() * channels),
        "matmul": runner(lambda: a @ b, setting, 2.0 * order**3),
    }
