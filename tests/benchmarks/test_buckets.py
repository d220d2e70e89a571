"""The pictures of several shapes that the benchmark of buckets trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import buckets
from benchmarks.photographs import tiles


def test_a_canvas_of_each_shape_holds_what_its_caption_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [buckets.Drawing(np.full((88, 88, 3), level, np.uint8), str(level)) for level in (40, 90, 140)]
    monkeypatch.setattr(buckets, "drawings", lambda side: known)
    buckets.write(tmp_path / "raw", buckets.canvases(copies=2))
    for number in range(10):
        file = tmp_path / f"raw/{number:05d}.png"
        pixels = np.asarray(Image.open(file))
        assert pixels.shape[1::-1] == buckets.SIZES[number % 5]
        shown = [level for level in np.unique(pixels[..., 0]).tolist() if level != 255]
        assert sorted(
            file.with_suffix(".txt").read_text().replace("above", "and").split(" and "), key=int
        ) == [str(level) for level in shown]
    for resolution in buckets.RESOLUTION.values():
        params = [buckets.params_of(fit, resolution, 320) for fit in buckets.FITS]
        assert [each.data.fit for each in params] == ["crop", "buckets"]


def test_a_tile_has_its_shape_and_lies_in_its_photograph(tmp_path: Path) -> None:
    files = [tmp_path / "a_tall.png", tmp_path / "wide.png"]
    for file, (width, height) in zip(files, ((90, 200), (300, 100)), strict=True):
        ramp = np.add.outer(np.arange(height) / height, np.arange(width) / width) * 100 + 20
        Image.fromarray(ramp.astype(np.uint8)).save(file)
    made = tiles(files, buckets.SIZES, copies=4)
    assert [picture.size for picture, _ in made] == list(buckets.SIZES) * 4
    assert [name for _, name in made] == (["a tall"] * 5 + ["wide"] * 5) * 2
    for picture, _ in made:
        pixels = np.asarray(picture).astype(int)
        assert pixels.min() >= 19 and pixels.max() <= 221, "no px from beyond an edge"
        assert pixels[-1, -1, 0] - pixels[0, 0, 0] > 40, "half to all of what fits"
