"""Figures have the right size and content; text fits its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation import figures
from pipeline.evaluation.memorisation import nearest


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
        neighbours = nearest(samples, train, [str(i) for i in range(9)])
        figures.draw_neighbours(
            tmp_path / "n.png", samples, ["asked"] * count, train, ["seen"] * 9, neighbours
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


@pytest.mark.parametrize(
    ("model", "title"),
    [("refined_1", "refined, 1 pass"), ("refined_4", "refined, 4 passes"), ("finetuned", "fine-tuned")],
)
def test_models_have_titles_for_people(model: str, title: str) -> None:
    assert figures.title_of(model) == title
