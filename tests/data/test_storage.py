"""Pictures on disk: what is written is read, raw or PNG, in shards of any size, with exact box sums."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import storage
from pipeline.prepare import shards


def pictures(count: int, resolution: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, resolution, resolution), dtype=np.uint8)


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_what_is_written_is_read_in_any_order(tmp_path: Path, encoding: str) -> None:
    images = pictures(5)
    storage.write(tmp_path, "images", (storage.encode(image, encoding) for image in images), 5, encoding)
    found = storage.Pictures(tmp_path, "images")
    assert len(found) == 5
    order = np.array([4, 0, 2, 2])
    assert np.array_equal(np.stack([found.row(i) for i in order.tolist()]), images[order])
    assert np.array_equal(storage.decode(found.stored(3)), images[3])


def test_an_empty_set_can_be_written(tmp_path: Path) -> None:
    storage.write(tmp_path, "images", iter(()), 0, "raw")
    assert len(storage.Pictures(tmp_path, "images")) == 0


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_the_data_set_reads_all_shards(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.dataset import PreparedDataset
    from tests.conftest import write_prepared

    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 3 * 16**2)
    write_prepared(tmp_path / "data", encoding=encoding)
    dataset = PreparedDataset(tmp_path / "data")
    assert len(list((tmp_path / "data").glob("low-*.npy"))) == 5
    rows = np.array([23, 4, 5, 0, 11])
    images, low = dataset.images(rows), dataset.low_images(rows)
    assert low.shape == (5, 3, 8, 8)
    exact = images.double().reshape(5, 3, 8, 2, 8, 2).mean((3, 5))
    assert (low.double() == exact).all(), "box means of the same pictures, to the last bit"


def test_box_sums_of_white_fill_their_sixteen_bits() -> None:
    white = np.full((3, 256, 256), 255, np.uint8)
    assert shards.box_sums(white, 16).max() == 255 * 256
    assert shards.box_side(256, 8) == 16, "a larger one would not fit"


def test_large_sets_are_encoded_unless_asked_otherwise() -> None:
    assert shards.choose_encoding("auto", 600, 64) == "raw"
    assert shards.choose_encoding("auto", 600_000, 256) == "png"
    assert shards.choose_encoding("raw", 600_000, 256) == "raw"
