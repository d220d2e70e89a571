"""Figures have the right size and content; text fits its place."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation import charts, figures
from pipeline.evaluation.charts import Point
from pipeline.evaluation.memorisation import TrainingImages, thumbnails
from pipeline.evaluation.metrics import Metric


def flat(n: int, resolution: int, level: int) -> torch.Tensor:
    return torch.full((n, 3, resolution, resolution), level, dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, 8, 16, 40])
def test_a_caption_grid_shows_at_most_sixteen_captions_and_every_model(tmp_path: Path, count: int) -> None:
    captions = [f"caption {i}" for i in range(count)]
    shown = {"core": flat(count, 32, 100), "refined_1": flat(1, 64, 200)}
    figures.draw_captions(tmp_path / "grid.png", captions, flat(count, 64, 10), shown)
    with Image.open(tmp_path / "grid.png") as opened:
        sheet = np.asarray(opened.convert("L"))
    blocks = -(-min(count, 16) // 8)
    assert (sheet == 10).sum() >= min(count, 16) * figures.TILE**2
    assert (sheet == 100).sum() >= min(count, 16) * figures.TILE**2
    assert (sheet == 200).sum() >= figures.TILE**2
    assert sheet.shape[0] % blocks == 0


def test_neighbours_are_drawn_for_few_and_many_samples(tmp_path: Path) -> None:
    train = torch.randint(0, 256, (9, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for count in (1, 30):
        samples = train[torch.arange(count) % 9]
        neighbours = TrainingImages(train.__getitem__, np.arange(9)).nearest(thumbnails(samples))
        nearest, captions = train[neighbours.row], (["asked"] * count, ["seen"] * count)
        figures.draw_neighbours(
            tmp_path / "n.png", samples, captions[0], nearest, captions[1], neighbours.rho
        )
        with Image.open(tmp_path / "n.png") as sheet:
            assert sheet.width > 1000


@pytest.mark.parametrize(
    "text", ["", "cat", "a rather long caption of many words that goes on and on", "x" * 400, "é" * 50 + " b"]
)
def test_wrapped_text_fits_its_box(text: str) -> None:
    font = figures._font(13)
    lines = figures._wrap(text, font, 120, 3).split("\n")
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 120 for line in lines)


def test_short_text_is_not_changed() -> None:
    assert figures._wrap("grinning face", figures._font(13), 120, 3) == "grinning face"


def test_a_long_word_is_cut_in_no_time() -> None:
    lines = figures._wrap("w" * 100_000, figures._font(13), 120, 3).split("\n")
    assert len(lines) == 3
    assert lines[-1].endswith("\u2026")


def metric(value: float | None) -> Metric:
    return Metric.refused("kid", 4) if value is None else Metric(value, 60, value - 0.1, value + 0.2)


def points(*values: float | None) -> list[Point]:
    names = ("refined_1", "refined_2", "equal_cost_2", "eight_calls", "finetuned", "champion")
    return [
        Point(name, 10 ** (8 + i), i + 1, 0.01 * 10**i, metric(value))
        for i, (name, value) in enumerate(zip(names[: len(values)], values, strict=True))
    ]


QUALITY = {"heldout": points(3.0, 0.4, 20.0, -0.05, 0.0, 0.3), "train": points(None, None)}


def test_quality_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    charts.draw_quality(tmp_path / "quality.png", QUALITY, threshold=0.1)
    with Image.open(tmp_path / "quality.png") as sheet:
        assert sheet.width > 1000
    wide, narrow = (charts.quality_svg(QUALITY, 0.1, stacked) for stacked in (False, True))
    for svg in (wide, narrow):
        root = ElementTree.fromstring(svg)
        text = " ".join(root.itertext())
        assert "1 pass: 1 call, 10 ms" in text
        assert "default: 5 calls, 100 s" in text
        assert "champion: 6 calls" in text
        assert "too few images to measure" in text


def test_the_chart_takes_its_colours_from_the_page_and_is_the_same_each_time() -> None:
    svg = charts.quality_svg(QUALITY, 0.1, stacked=False)
    assert svg == charts.quality_svg(QUALITY, 0.1, stacked=False)
    for name in ("ink", "faint", "line", "refined", "finetuned", "champion"):
        assert f"var(--{name})" in svg
    assert "#000000" not in svg, "black text does not show on dark"


def test_labels_cover_neither_each_other_nor_the_points() -> None:
    figure = charts._figure({"heldout": QUALITY["heldout"]}, 0.1, (6, 5), False, 100)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    overlap = [charts._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(boxes) == 6
    assert max(overlap) == 0
