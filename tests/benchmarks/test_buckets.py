"""The pictures of several shapes that the benchmark of buckets trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import buckets


def test_a_canvas_of_each_shape_holds_what_its_caption_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [buckets.Drawing(np.full((88, 88, 3), level, np.uint8), str(level)) for level in (40, 90, 140)]
    monkeypatch.setattr(buckets, "drawings", lambda side: known)
    buckets.compose(tmp_path, copies=2)
    for number in range(10):
        file = tmp_path / f"data/raw/{number:05d}.png"
        pixels = np.asarray(Image.open(file))
        assert pixels.shape[1::-1] == buckets.SIZES[number % 5]
        shown = [level for level in np.unique(pixels[..., 0]).tolist() if level != 255]
        assert sorted(
            file.with_suffix(".txt").read_text().replace("above", "and").split(" and "), key=int
        ) == [str(level) for level in shown]
    assert [buckets.params_of(fit, 320).data.fit for fit in buckets.FITS] == ["crop", "buckets"]
