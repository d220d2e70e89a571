"""Shapes of the presets: parameters and multiply-adds of one call, counted without allocating anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.strict_yaml import read_yaml
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import build_core, build_shell

PRESETS = Path(__file__).resolve().parents[2] / "presets"
TEXT_DIM = 384


def read(name: str) -> dict[str, Any]:
    return read_yaml(PRESETS / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "millions", "gmac"),
    [
        ("cpu-demo", 3.1, 0.49),
        ("demo-256", 1.65, 1.24),
        ("small-64", 31, 8.5),
        ("small", 32, 12.5),
        ("base-64", 109, 32),
        ("base", 112, 62),
        ("large", 280, 170),
    ],
)
def test_a_preset_has_the_size_it_is_meant_to_have(name: str, millions: float, gmac: float) -> None:
    tree = read(name)
    core = {k: v for k, v in tree["core"].items() if k != "resolution"}
    tokens = tree["data"]["max_tokens"]
    with torch.device("meta"):
        model: Any = build_core(tree["core"]["resolution"], TEXT_DIM, core)
        channels, patch = tree["shell"]["channels"], tree["shell"]["patch"]
        for width, fold in zip(
            channels, patch if isinstance(patch, list) else [patch] * len(channels), strict=True
        ):
            model = build_shell(model, TEXT_DIM, 0.04, {**tree["shell"], "channels": width, "patch": fold})
        assert model.resolution == tree["data"]["resolution"]
        mask = torch.ones(1, tokens, dtype=torch.bool)
        text = Conditioning(torch.empty(1, TEXT_DIM), torch.empty(1, tokens, TEXT_DIM), mask)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, model.resolution, model.resolution), torch.ones(1), text)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.05)
