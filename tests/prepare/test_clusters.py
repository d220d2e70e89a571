"""Families that look alike are joined: against all pairs, mirrored, and on the demo's emoji."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipeline.config.params import load_params
from pipeline.prepare.clusters import box_means, connected, join_similar, similar_pairs
from pipeline.prepare.framing import Framing
from pipeline.prepare.intake import select
from pipeline.prepare.shards import box_side, box_sums
from pipeline.prepare.sources.openmoji import OpenMoji
from pipeline.prepare.splits import assign_splits

ROOT = Path(__file__).resolve().parents[2]


def pictures(count, seed=0):
    """Smooth random images, uint8 [n, 3, 16, 16]."""
    coarse = np.random.default_rng(seed).integers(60, 196, (count, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(4, 2).repeat(4, 3)


def noisy(images, scale, seed=1):
    noise = np.random.default_rng(seed).normal(0, scale, images.shape)
    return np.rint(images + noise).clip(0, 255).astype(np.uint8)


def join(images, names=None):
    """Names of the clusters of images, uint8 [n, 3, R, R]."""
    names = names or [str(number) for number in range(len(images))]
    size = images.shape[-1]
    return join_similar(names, (box_sums(image, 1) for image in images), size, 1)


def test_a_slightly_changed_image_is_found_also_mirrored() -> None:
    images = pictures(300)
    changed = noisy(images, 4.0)[..., ::-1]
    found = join(np.concatenate([images, changed]))
    assert found.names == [str(number) for number in range(300)] * 2
    assert found.summary() == {"families": 600, "joined": 300, "largest": 2, "largest_name": "0"}


def test_what_differs_more_stays_apart() -> None:
    images = pictures(300)
    found = join(np.concatenate([images, noisy(images, 12.0)]))
    assert found.summary()["joined"] == 0 and found.summary()["largest"] == 1


def test_a_faint_image_must_agree_as_a_fraction_of_its_contrast() -> None:
    faint = (pictures(20).astype(int) // 16 + 200).astype(np.uint8)
    assert join(faint).summary()["joined"] == 0


def test_families_are_joined_whole_and_named_after_the_first() -> None:
    images = pictures(4)
    images[3] = noisy(images[1:2], 2.0)[0]
    found = join(images, ["cat", "dog", "cow", "cat"])
    assert found.names == ["cat", "cat", "cow", "cat"] and found.largest == (2, "cat")


def test_nearly_all_pairs_that_look_alike_are_found_and_no_others() -> None:
    images = pictures(400)
    images = np.concatenate([images, noisy(images, 7.0)])
    flat = images.reshape(800, -1).astype(float)
    mirrored = images[..., ::-1].reshape(800, -1).astype(float)
    expected = np.minimum(cdist(flat, flat), cdist(flat, mirrored)) <= 8 * np.sqrt(768)
    expected = {(a, b) for a, b in np.argwhere(expected).tolist() if a < b}
    found = set(map(tuple, similar_pairs(images, np.arange(800)).tolist()))
    assert found <= expected and len(found) >= 0.97 * len(expected) >= 380


def test_many_images_of_one_key_cost_no_more_than_a_window_each() -> None:
    images = noisy(pictures(1).repeat(500, 0), 1.0)
    assert len(similar_pairs(images, np.arange(500))) < 500 * 8 * 32
    assert join(images).largest == (500, "0")


@pytest.mark.parametrize("core", [16, 32])
def test_box_means_do_not_depend_on_the_resolution_of_the_core(core) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    means = box_means([box_sums(image, 64 // core)], 64 // core, 16, 1)[0]
    assert np.array_equal(means, np.floor(image.reshape(3, 16, 4, 16, 4).mean((2, 4)) + 0.5))


def test_no_image_and_one_image_have_no_pairs() -> None:
    assert join_similar([], [], 16, 1).names == [] and join(pictures(1)).names == ["0"]
    assert connected(4, [(2, 3), (1, 3)]) == [0, 1, 1, 1] and connected(0, []) == []


def test_the_demo_has_enough_families_to_learn_from_and_to_judge_by() -> None:
    params = load_params(ROOT / "params.yaml")
    data = params.data
    source = OpenMoji(data.source.partition("==")[2], Framing(data.resolution, data.fit, data.background))
    images, names = {}, []
    for item in select(source.listing().items, data.subset):
        pixels = source.decode(source.read(item), item.where).pixels.transpose(2, 0, 1)
        if pixels.tobytes() not in images:
            images[pixels.tobytes()] = np.ascontiguousarray(pixels)
            names.append(item.family)
    factor = box_side(data.resolution, params.core.resolution)
    sums = (box_sums(pixels, factor) for pixels in images.values())
    found = join_similar(names, sums, data.resolution, factor)
    assert 250 <= len(set(found.names)) < found.families and found.largest[0] <= 10
    splits = assign_splits(found.names, params.seed, data.split.model_dump())
    families, counts = Counter(splits.values()), Counter(splits[name] for name in found.names)
    assert families["train"] >= 170 and families["test"] >= 60
    assert 530 <= counts["train"] <= 700
