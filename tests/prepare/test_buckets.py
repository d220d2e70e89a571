"""Buckets: sizes of many shapes and one area, chosen from the data; images in them keep their shape."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.params import parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import ConfigError
from pipeline.prepare.buckets import MAX_BUCKETS, MIN_IMAGES, candidate_sizes, choose_sizes
from pipeline.prepare.framing import Framing
from pipeline.prepare.images import decode_square
from pipeline.prepare.prepare import prepare


def test_sides_are_multiples_of_the_step_and_areas_near_the_square_one() -> None:
    assert candidate_sizes(128, 32) == ((128, 128), (160, 96), (96, 160), (192, 96), (96, 192))
    for width, height in candidate_sizes(256, 16):
        assert width % 16 == 0 == height % 16 and 0.75 < width * height / 256**2 < 1.25
        assert max(width, height) <= 3 * min(width, height)


def test_a_size_with_few_images_gives_them_to_its_neighbour() -> None:
    candidates = candidate_sizes(128, 32)
    files = [(300, 300)] * 90 + [(300, 180)] * MIN_IMAGES + [(200, 400)] * (MIN_IMAGES - 1)
    assert choose_sizes(candidates, files) == ((128, 128), (160, 96))
    assert choose_sizes(candidates, [(10, 30)] * 3) == ((96, 192),), "the last one stays"
    many = [(100 + 10 * i, 200) for i in range(60) for _ in range(MIN_IMAGES)]
    assert len(choose_sizes(candidate_sizes(256, 8), many)) <= MAX_BUCKETS


def test_an_image_keeps_its_shape_also_where_its_file_is_turned() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 300, dtype=np.uint8)[None, :, None], (180, 300, 3))
    framing = Framing(128, "buckets", (255, 255, 255), ((128, 128), (160, 96), (96, 192)))
    files = []
    for turned in (False, True):
        file, exif = io.BytesIO(), Image.Exif()
        image = Image.fromarray(np.ascontiguousarray(ramp))
        if turned:
            exif[0x0112], image = 6, image.transpose(Image.Transpose.ROTATE_90)
        image.save(file, "PNG", exif=exif)
        files.append(decode_square(file.getvalue(), "a.png", framing))
    for decoded in files:
        assert decoded.pixels.shape == (96, 160, 3) and (decoded.width, decoded.height) == (300, 180)
        assert abs(np.diff(decoded.pixels[48, :, 0].astype(int)) - 1.6).max() < 1.7, "nothing cut off"
        assert decoded.pixels[48, 0, 0] <= 2 and decoded.pixels[48, -1, 0] >= 253


def test_the_stage_stores_bucket_after_bucket_and_says_which(tiny_tree, tmp_path) -> None:
    sizes = {"square": (24, 24, 20), "wide": (30, 18, 10), "tall": (18, 36, 3)}  # of the last, too few
    for name, (width, height, count) in sizes.items():
        for number in range(count):
            pixels = np.random.default_rng([width, number]).integers(
                0, 256, (height, width, 3), dtype=np.uint8
            )
            path = tmp_path / "data/raw" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    changes = {
        "source": "folder",
        "path": "data/raw",
        "subset": [],
        "fit": "buckets",
        "text_encoder": "label",
    }
    params, lines = parse_params({**tiny_tree, "data": {**tiny_tree["data"], **changes}}), []
    metrics = prepare(params, tmp_path, tmp_path / "work", log=lines.append)
    assert metrics["buckets"] == {"16x16": 23, "20x12": 10}
    assert "buckets: 23 of 16x16, 10 of 20x12 px" in lines
    cut = [line for line in lines if line.startswith("note: 3 images are cropped by more than a third")]
    assert len(cut) == 1 and "data/raw/tall/0.png (50%)" in cut[0]
    dataset = PreparedDataset(tmp_path / "data/prepared")
    assert dataset.buckets == [(16, 16, 23), (12, 20, 10)]
    wide = np.array([i for i, row in enumerate(dataset.rows) if row["group"] == "wide"])
    assert dataset.images(wide).shape == (10, 3, 12, 20) and dataset.shape_of(int(wide[0])) == (0.75, 1.25)
    means = torch.nn.functional.avg_pool2d(dataset.images(wide).float(), 2)
    assert torch.equal(dataset.low_images(wide), means)


def test_a_step_that_the_networks_cannot_take_is_refused_with_the_one_they_can(tiny_tree) -> None:
    tree = {**tiny_tree, "data": {**tiny_tree["data"], "fit": "buckets", "bucket_step": 2}}
    with pytest.raises(ConfigError, match=r"data.bucket_step: 2 px .* 4 px, .* Fix: write 4"):
        parse_params(tree)
    tree["data"]["bucket_step"], regions = 4, {"probability": 0.5, "maps": "random"}
    assert parse_params(tree)
    with pytest.raises(ConfigError, match=r"data.bucket_step: 4 px .* 8 px, .* Fix: write 8"):
        parse_params(tree | {"regions": regions})
