"""What is trained, and how: sizes of our networks, plans of the peers', and the setting that all share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

OURS, DIFFUSERS, DDPM = "crescendo", "diffusers UNet2DModel", "denoising-diffusion-pytorch Unet"
CONTENDERS = (OURS, DIFFUSERS, DDPM)
TEXT_DIM, TOKENS = 384, 16


@dataclass(frozen=True)
class Size:
    """Keyword values of our networks."""

    core: dict[str, Any]
    shells: tuple[dict[str, Any], ...]  # as many as there may be
    core_resolution: int = 32

    def __str__(self) -> str:
        core = self.core
        plan = Plan(core["channels"], tuple(core["channel_mult"]), core.get("num_blocks", 1))
        return " + ".join([str(plan), *(str(shell["channels"]) for shell in self.shells)])

    def upto(self, resolution: int) -> Size:
        """With the shells that end at `resolution`."""
        return replace(self, shells=self.shells[: round(math.log2(resolution / self.core_resolution))])


SMALL = Size(
    core={"patch": 1, "channels": 96, "channel_mult": (1, 2, 3), "num_blocks": 3, "attention": (16, 8)},
    shells=tuple({"patch": 1, "channels": width, "num_blocks": 3} for width in (64, 32)),
)
TINY = Size(
    core={"patch": 1, "channels": 16, "channel_mult": (1, 2), "attention": (4,)},
    shells=({"patch": 2, "channels": 16},),
    core_resolution=8,
)


def demo() -> Size:
    """The networks of params.yaml."""
    from pipeline.config.params import load_params  # which needs what a bare machine lacks

    p = load_params(Path(__file__).resolve().parents[2] / "params.yaml")
    core = p.core.model_dump(mode="json", exclude={"resolution"})
    return Size(core, tuple(p.shell.nets()), p.core.resolution)


SIZES: dict[str, Callable[[], Size]] = {"demo": demo, "small": lambda: SMALL, "tiny": lambda: TINY}


@dataclass(frozen=True)
class Setting:
    """How all contenders of a table are trained."""

    device: torch.device
    dtype: torch.dtype
    resolution: int
    batch: int
    seconds: float = 1.0  # of one run
    repeats: int = 5


@dataclass(frozen=True)
class Plan:
    """A peer's network: base width, multiples of it for each level, blocks a level."""

    width: int
    multiples: tuple[int, ...]
    blocks: int = 2

    def __str__(self) -> str:
        return f"{self.width}x[{' '.join(map(str, self.multiples))}], {self.blocks}"


class Cost(NamedTuple):
    """What a network holds and does."""

    parameters: int
    macs: float  # multiply-adds of a forward pass for one image
