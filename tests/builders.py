"""Small networks and captions, as tests build them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.models.conditioning import Conditioning
from pipeline.models.config import SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import Denoiser, build_core, build_shell, pyramid_levels
from pipeline.models.snapshot import describe
from pipeline.models.statistics import Statistics

CORE = {"patch": 2, "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention": [4], "dropout": 0.0}
FLAT_CORE = {"patch": 2, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 2, "channels": 8, "num_blocks": 1}
WIDE_SHELL = {**SHELL, "channels": 16}

Module = TypeVar("Module", bound=nn.Module)


def build_pyramid(
    resolution: int,
    variances: Sequence[float] = (0.04,),
    *,
    core: dict[str, Any] = CORE,
    shell: dict[str, Any] = SHELL,
    dim: int = 8,
    seed: int = 0,
    gain: float = 0.7,
) -> Denoiser:
    """A core at `resolution` px and a shell per high-band variance: random weights, all gains open at `gain`."""
    torch.manual_seed(seed)
    denoiser: Denoiser = build_core(resolution, dim, core)
    for variance in variances:
        denoiser = build_shell(denoiser, dim, variance, shell)
    return open_gains(denoiser, gain)


def open_gains(module: Module, gain: float = 0.7) -> Module:
    """Set every gain, which starts at zero, so that each part of a network shows in its output."""
    for name, parameter in module.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(parameter, gain)
    return module


def perturb(module: Module, scale: float) -> Module:
    """Add normal noise to every parameter, zero gains included."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape)
    return module


def captions(n: int, dim: int = 8, known: bool = True) -> Conditioning:
    """Random vectors of three tokens each, always the same ones."""
    generator = torch.Generator().manual_seed(7)
    pooled, tokens = (torch.randn(*shape, dim, generator=generator) for shape in ((n,), (n, 3)))
    return Conditioning(pooled, tokens, torch.full((n, 3), known))


def no_text(n: int, dim: int = 8) -> Conditioning:
    """No captions."""
    return Conditioning(torch.zeros(n, dim), torch.zeros(n, 3, dim), torch.zeros(n, 3, dtype=torch.bool))


def snapshot_config(
    denoiser: Denoiser,
    kind: str = "finetuned",
    core: dict[str, Any] | None = None,
    shells: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> SnapshotConfig:
    """The config of a tiny model, given the keyword values of its networks where they matter."""
    built = describe(denoiser, core or {}, shells or [{}] * (len(pyramid_levels(denoiser)) - 1))
    config = SnapshotConfig(
        kind,
        *built,
        text_encoder={"name": "random", "sha256": "0" * 64, "dim": 384, "max_tokens": 16},
        statistics=Statistics((0.0,) * 3, (0.5,) * 3),
        sampling=SamplerSettings(8),
    )
    return replace(config, **changes)
