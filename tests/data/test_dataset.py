"""The order of training: a function of nimg, whatever the number of workers; box means for the core."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.augment import Augment
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.order import BatchOrder
from tests.conftest import write_bucketed


@pytest.fixture()
def dataset(tiny_root: Path) -> PreparedDataset:
    return PreparedDataset(tiny_root / "data/prepared")


def order(batches: Batches, shards: int, start: int, count: int) -> list[int]:
    """Rows of `count` batches of 8 from image `start`, shard by shard."""
    moments = range(start, start + 8 * count, 8)
    return [
        row for nimg in moments for shard in range(shards) for row in batches.places(nimg, shard)[1].tolist()
    ]


def test_every_image_is_seen_once_an_epoch(dataset: PreparedDataset) -> None:
    rows = dataset.split("train")
    seen = order(Batches(dataset, "train", 0, 8, 1), 1, 0, 3 * len(rows) // 8)
    for epoch in range(3):
        assert sorted(seen[epoch * len(rows) : (epoch + 1) * len(rows)]) == sorted(rows.tolist())
    assert seen[: len(rows)] != seen[len(rows) : 2 * len(rows)]


def test_one_two_and_four_shards_give_the_same_order(dataset: PreparedDataset) -> None:
    orders = [order(Batches(dataset, "train", 0, 8, shards), shards, 0, 7) for shards in (1, 2, 4)]
    assert orders[0] == orders[1] == orders[2]


def test_an_order_that_starts_in_mid_epoch_is_the_rest_of_the_whole(dataset: PreparedDataset) -> None:
    whole = order(Batches(dataset, "train", 0, 8, 2), 2, 0, 6)
    assert order(Batches(dataset, "train", 0, 8, 2), 2, 24, 3) == whole[24:]


def test_a_batch_holds_one_bucket_and_every_image_comes_before_any_of_its_bucket_comes_again(
    tmp_path: Path,
) -> None:
    sizes = [
        (16, 16),
        (12, 20),
        (16, 16),
        (20, 12),
        (12, 20),
    ] * 12  # the rarest has fewer images than a batch
    write_bucketed(tmp_path / "data", sizes)
    dataset = PreparedDataset(tmp_path / "data")
    whole = [Batches(dataset, "train", 0, 8, 1).places(nimg, 0) for nimg in range(0, 800, 8)]
    for nimg in (0, 392, 800 - 8):  # from anywhere, in any number of shards
        parts = [Batches(dataset, "train", 0, 8, 4).places(nimg, shard) for shard in range(4)]
        for one, other in zip(whole[nimg // 8], map(np.concatenate, zip(*parts, strict=True)), strict=True):
            assert np.array_equal(one, other)
    counts = dict(Counter(dataset.bucket_of(dataset.split("train")).tolist()))
    seen: dict[int, list[int]] = {bucket: [] for bucket in counts}
    for epochs, rows in whole:
        (bucket,) = set(dataset.bucket_of(rows).tolist())
        assert epochs.tolist() == [(len(seen[bucket]) + i) // counts[bucket] for i in range(8)]
        seen[bucket] += rows.tolist()
    for bucket, rows in seen.items():
        for start in range(0, len(rows) - counts[bucket] + 1, counts[bucket]):
            assert len(set(rows[start : start + counts[bucket]])) == counts[bucket]
        assert abs(len(rows) - 800 * counts[bucket] / len(dataset.split("train"))) <= 8 + len(counts), (
            "none lags"
        )


def test_images_may_be_shuffled_a_few_files_at_a_time() -> None:
    files = np.repeat(np.arange(10), 6)
    order = BatchOrder(np.zeros(60, np.int64), 12, 0, files, shuffle_images=12)
    epochs = [
        np.concatenate([order.places(epoch * 60 + i * 12, 12)[1] for i in range(5)]) for epoch in (0, 1)
    ]
    for seen in epochs:
        assert sorted(seen.tolist()) == list(range(60))
        for group in seen.reshape(5, 12):
            assert len(set(files[group].tolist())) == 2 and group.tolist() != sorted(group.tolist())
    assert {frozenset(files[g].tolist()) for g in epochs[0].reshape(5, 12)} != {
        frozenset(files[g].tolist()) for g in epochs[1].reshape(5, 12)
    }
    whole = BatchOrder(np.zeros(60, np.int64), 12, 0)
    unbounded = BatchOrder(np.zeros(60, np.int64), 12, 0, files, shuffle_images=60)
    assert np.array_equal(whole.places(24, 12)[1], unbounded.places(24, 12)[1])


def test_the_core_is_trained_on_exact_box_means(dataset: PreparedDataset) -> None:
    low, full = Batches(dataset, "train", 0, 8, 1, 8), Batches(dataset, "train", 0, 8, 1, 16)
    small, text = low.at(8, 0).to("cpu")
    large, same = full.at(8, 0).to("cpu")
    assert small.shape == (8, 3, 8, 8) and large.shape == (8, 3, 16, 16)
    assert torch.equal(torch.nn.functional.avg_pool2d(large, 2), small)
    assert torch.equal(text.tokens, same.tokens)


def test_augmentation_is_the_same_however_the_batch_is_cut(dataset: PreparedDataset) -> None:
    augment = Augment(0.5, True, 0.2, 20.0, 0.1, 90.0)
    whole, text = Batches(dataset, "train", 0, 8, 1, 8, augment).at(8, 0).to("cpu")
    parts = [Batches(dataset, "train", 0, 8, 4, 8, augment).at(8, shard).to("cpu") for shard in range(4)]
    torch.testing.assert_close(torch.cat([images for images, _ in parts]), whole)
    labels = torch.cat([part.augment for _, part in parts if part.augment is not None])
    assert text.augment is not None and torch.equal(labels, text.augment)
    assert np.any(labels.numpy() != 0)


def test_no_augmentation_leaves_the_text_without_labels(dataset: PreparedDataset) -> None:
    batches = Batches(dataset, "train", 0, 8, 1, 8, Augment(0.0, True, 0.2, 20.0, 0.1, 90.0))
    assert batches.at(0, 0).to("cpu")[1].augment is None
