"""The judge: its two numbers on images with known answers, and what it leaves beside a snapshot."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.models.snapshot import save_snapshot
from pipeline.watch import judge
from tests.builders import FLAT_CORE, SHELL, build_pyramid, snapshot_config


def textures(n: int, seed: int) -> torch.Tensor:
    """uint8 [n,3,32,32]: smooth colours with fine grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 4, 4, generator=generator), size=32, mode="bilinear")
    grain = 0.2 * torch.randn(n, 3, 32, 32, generator=generator)
    return (255 * (coarse + grain)).clamp(0, 255).to(torch.uint8)


def test_real_images_score_zero_and_blurred_ones_are_further_away_and_less_sharp() -> None:
    real = textures(256, seed=0)
    same = judge.compare(real, textures(64, seed=1), real.shape[-1])
    blurred = F.avg_pool2d(textures(64, seed=1).float(), 3, 1, 1).to(torch.uint8)
    worse = judge.compare(real, blurred, real.shape[-1])
    assert abs(same["watch/kid"]) < 0.1 < worse["watch/kid"]
    assert abs(same["watch/top_octave"]) < 0.1
    assert worse["watch/top_octave"] < -1


@pytest.mark.slow
def test_numbers_and_pictures_of_all_snapshots_lie_beside_them(tiny_root: Path, tmp_path: Path) -> None:
    denoiser = build_pyramid(8, core=FLAT_CORE, shell=SHELL, dim=384)
    for nimg in (16, 32):
        path = tmp_path / f"nimg-{nimg:012d}"
        save_snapshot(path, denoiser, snapshot_config(denoiser, core=FLAT_CORE, shells=[SHELL]))
        judge.judge(tiny_root, path)
    scores = (tmp_path / "scores.jsonl").read_text()
    judge.judge(tiny_root, path)  # again
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [record["nimg"] for record in records] == [16, 32]
    first, again = json.loads(scores.splitlines()[1]), records[1]
    assert first["metrics"] == again["metrics"], "captions, seeds and real images are fixed"
    assert records[0]["metrics"] == records[1]["metrics"], "of equal weights"
    with open(tmp_path / "watch.csv") as file:
        assert [row["nimg"] for row in csv.DictReader(file)] == ["16", "32"]
    with Image.open(tmp_path / "watch.png") as picture:
        assert picture.width > 900
    with Image.open(tmp_path / "rows/nimg-000000000016.png") as row:
        assert row.size == (4 * 20, 20)  # the data set has four images for validation
