"""What tests of benchmarks share."""

from __future__ import annotations

from pipeline.models.config import SamplerSettings
from pipeline.models.snapshot import Snapshot
from tests.builders import FLAT_CORE, build_pyramid, snapshot_config


def lines(text: str) -> list[str]:
    """The lines of the tables in a text."""
    return [line for line in text.splitlines() if line.startswith("|")]


def tiny_pyramid() -> Snapshot:
    """A model of 32 px around a core of 16 px."""
    denoiser = build_pyramid(16, (0.01,), core=FLAT_CORE, dim=384, gain=0.5)
    sampling = SamplerSettings(6, "sde_dpmpp_2m", guidance=1.5, guidance_interval=(0.3, 5.0))
    config = snapshot_config(denoiser, sampling=sampling)
    return Snapshot(denoiser.eval().requires_grad_(False), config, "")
