"""Costs of octaves, counted and measured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks import scale
from benchmarks.train import settings
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import pyramid_levels
from tests.benchmarks.tables import lines

TINY = scale.Shape(settings.TINY.core, settings.TINY.shells, settings.TINY.core_resolution)


def test_scale_table_has_every_octave_and_plans_what_takes_too_long() -> None:
    rows = [line.split("|")[1:-1] for line in lines(scale.scale_table(TINY, 32, 6, 1e-9, repeats=1))[2:]]
    assert [row[0].strip() for row in rows] == ["8", "16", "32"]
    assert [row[1].strip() for row in rows] == ["16", "16", "16"]
    cells = [row[-1].strip() for row in rows]
    assert float(cells[0]) >= 0 and all(text.startswith("~") for text in cells[1:])


def test_scale_counts_the_steps_that_a_picture_takes_at_each_level() -> None:
    denoiser = TINY.build(32)
    calls = {level.resolution: 0 for level in pyramid_levels(denoiser)}

    def count(module, *_) -> None:
        calls[module.resolution] += 1

    for level in pyramid_levels(denoiser):
        level.register_forward_hook(count)
    sample_pyramid(denoiser, scale.captions("cpu"), [0], SamplerSettings(12, "dpmpp_2m"))
    planned = scale.plan(TINY, 32, 12, torch.float32)
    assert planned.steps == list(calls.values()) == scale.steps_at_levels(denoiser, 12)
    assert planned.whole > planned.image > 12 * planned.macs[0]


def test_scale_plans_the_bytes_that_autograd_keeps() -> None:
    layer = torch.nn.Linear(4, 8)
    x = torch.randn(2, 4, requires_grad=True)
    assert scale.kept_bytes(lambda: layer(x).exp(), layer) == 4 * (2 * 4 + 2 * 8)


@pytest.mark.parametrize("name", scale.PRESETS)
def test_shells_beyond_a_preset_have_half_the_channels_of_the_one_before(name) -> None:
    shape = scale.read_shape(name)
    widths = [shape.shell(octave)["channels"] for octave in range(6)]
    known = len(shape.shells)
    assert widths[:known] == [shell["channels"] for shell in shape.shells]
    assert all(after == max(before // 2, 16) for before, after in pairwise(widths[known - 1 :]))
