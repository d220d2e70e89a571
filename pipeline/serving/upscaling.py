"""From a request to enlarge an image to the work of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.inference.upscaling import UpscaleSettings, own_steps, shells_for
from pipeline.prepare import images
from pipeline.serving.batching import UpscaleJob
from pipeline.serving.sizes import Size, parse_size, size_text

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.prepare.framing import Pixels
    from pipeline.serving.model import Served
    from pipeline.serving.schemas import EditRequest


def enlargement(
    model: Served, body: EditRequest, pixels: Pixels
) -> tuple[UpscaleSettings, int, Size, list[str]]:
    """How an image [H,W,3] is enlarged, to which size, and what is to be said about it.

    Without a factor, that of 2 and 4 whose result is nearer to the size asked for. Raises ConfigError where the
    model cannot upscale."""
    height, width, _ = pixels.shape
    asked = parse_size(body.size)
    factor = None if body.factor is None else int(body.factor)
    if factor is None:
        area = 0 if asked is None else asked[0] * asked[1]
        factor = 4 if area > 8 * width * height else 2  # 8: between 2 x 2 and 4 x 4, as ratios go
    size = factor * width, factor * height
    said = f"size: {body.size} is not {factor} times that of the image, {size_text(size)} is"
    notes = [] if asked in (None, size) else [said]
    snapshot = model.generator.snapshot
    shells_for(snapshot, factor)
    steps = own_steps(snapshot.config) if body.steps is None else body.steps
    settings = UpscaleSettings(factor, steps)
    if body.strength is not None:
        settings = replace(settings, sigma_low=body.strength)
    return settings, steps, size, notes


def upscale_jobs(
    model: Served, pixels: Pixels, prompt: str, seeds: Sequence[int], settings: UpscaleSettings
) -> list[UpscaleJob]:
    """One enlargement a seed."""
    return [
        UpscaleJob(model=model, prompt=prompt, seed=seed, image=pixels, settings=settings) for seed in seeds
    ]


def with_alpha(enlarged: Tensor, alpha: Pixels | None) -> Tensor:
    """uint8 [3,H,W], or [4,H,W] where the image had transparency [H/f,W/f]."""
    import torch

    if alpha is None:
        return enlarged
    pixels = images.with_alpha(enlarged.permute(1, 2, 0).numpy(), alpha)
    return torch.from_numpy(pixels).permute(2, 0, 1)
