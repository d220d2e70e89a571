"""The film strip: the images of its grids, in the order of training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.training.film import CELL, GAP, MARGIN, SHOWN, TITLE, frames, images_of, save_film, spread
from pipeline.training.reports import save_grid


def grid(path: Path, count: int, height: int = 8, width: int = 8) -> torch.Tensor:
    """Write a grid of images of one grey each; these greys."""
    greys = torch.arange(count, dtype=torch.uint8) * 10 + 20
    save_grid(path, greys[:, None, None, None].expand(count, 3, height, width).contiguous(), columns=8)
    return greys


@pytest.mark.parametrize("count", [1, 2, 9, 16])
def test_the_images_of_a_grid_are_found_again(tmp_path: Path, count: int) -> None:
    greys = grid(tmp_path / "grid.png", count, height=6, width=8)
    found = [np.asarray(image) for image in images_of(tmp_path / "grid.png", count)]
    assert [image.shape for image in found] == [(8, 8, 3)] * count
    assert [int(image[4, 4, 0]) for image in found] == greys.tolist()
    assert all((image[0] == 255).all() and (image[1:-1] != 255).all() for image in found)


def test_columns_follow_training_and_rows_are_every_second_image(tmp_path: Path) -> None:
    for nimg in (128, 16):
        grid(tmp_path / f"samples/nimg-{nimg:012d}.png", 4)
    grid(tmp_path / "finished.png", 4, height=2 * CELL, width=2 * CELL)
    columns = frames("refine", tmp_path, tmp_path / "finished.png")
    assert [title for title, _ in columns] == ["refine\n16 images", "refine\n128 images", "refine\nfinished"]
    held_out = ["a caption of \u3042, longer than a line of it", ""]
    save_film(tmp_path / "film.png", columns, ["red heart", ""], held_out)
    film = np.asarray(Image.open(tmp_path / "film.png"))
    assert film.shape == (TITLE + 2 * (CELL + GAP), MARGIN + 3 * (CELL + GAP), 3)
    middles = [TITLE + CELL // 2, TITLE + CELL + GAP + CELL // 2]
    assert film[middles, MARGIN + CELL // 2, 0].tolist() == [20, 40]


def test_of_many_grids_the_first_the_last_and_some_between_are_shown() -> None:
    assert spread(0, SHOWN) == [] and spread(3, SHOWN) == [0, 1, 2]
    chosen = spread(100, SHOWN)
    assert len(chosen) == SHOWN and chosen[0] == 0 and chosen[-1] == 99
