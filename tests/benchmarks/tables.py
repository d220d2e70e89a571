"""What tests of benchmarks share."""

from __future__ import annotations

from pipeline.models.snapshot import Snapshot
from tests.builders import FLAT_CORE, build_pyramid


def lines(text: str) -> list[str]:
    """The lines of the tables in a text."""
    return [line for line in text.splitlines() if line.startswith("|")]


def tiny_pyramid() -> Snapshot:
    """A model of 32 px around a core of 16 px."""
    denoiser = build_pyramid(16, (0.01,), core=FLAT_CORE, dim=384, gain=0.5)
    sampling = {"sampler": "sde_dpmpp_2m", "num_steps": 6, "guidance": 1.5, "guidance_interval": [0.3, 5.0]}
    config = {
        "kind": "finetuned",
        "statistics": {"mean": [0.0] * 3, "std": [0.5] * 3},
        "sampling": sampling | {"lift": [8.0], "finish": False},
    }
    return Snapshot(denoiser.eval().requires_grad_(False), config, "")
