"""Splits: families stay together, shares come out right, the order of files does not matter."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation import conditions
from pipeline.evaluation.metrics import MIN_FAMILIES as INTERVAL_FAMILIES
from pipeline.evaluation.metrics import NEEDS
from pipeline.prepare.splits import (
    JUDGED,
    MIN_FAMILIES,
    MIN_TRAIN,
    SPLITS,
    assign_splits,
    hardly_judged,
    shortage,
)

SHARES = {"train": 0.70, "val": 0.05, "test": 0.25}


def split(images, seed=0):
    return assign_splits(images, seed, SHARES)


def test_shares_are_those_asked_for() -> None:
    images = [str(number) for number in range(1000)]
    assert Counter(split(images).values()) == {"train": 700, "val": 50, "test": 250}
    other = assign_splits(images, 0, {"train": 0.85, "val": 0.05, "test": 0.10})
    assert Counter(other.values()) == {"train": 850, "val": 50, "test": 100}


def test_big_families_are_spread_over_the_splits() -> None:
    images = (
        [f"big{n // 18}" for n in range(360)]
        + [f"six{n // 6}" for n in range(240)]
        + list(map(str, range(200)))
    )
    splits = split(images)
    families, found = Counter(splits.values()), Counter(splits[family] for family in images)
    for name, share in SHARES.items():
        assert abs(families[name] - share * len(splits)) <= 1
        assert abs(found[name] - share * len(images)) <= 18


def test_the_order_of_the_images_does_not_matter_and_the_seed_does() -> None:
    images = [str(number) for number in range(200)]
    assert split(images) == split(images[::-1])
    assert split(images) != split(images, 1)


@pytest.mark.parametrize("count", [5, 6, 10, 19])
@pytest.mark.parametrize("shares", [SHARES, {"train": 0.2, "val": 0.2, "test": 0.6}])
def test_five_families_are_enough_for_all_splits(count, shares) -> None:
    found = Counter(assign_splits(list(map(str, range(count))), 0, shares).values())
    assert all(found[name] >= least for name, least in MIN_FAMILIES.items())


def counted(count):
    sizes = Counter(split(list(map(str, range(count)))).values())
    return sizes, sizes


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (1, "the splits need 5 families of images (3 train, 1 val, 1 test), found 1 in 1"),
        (4, "the splits need 5 families of images (3 train, 1 val, 1 test), found 4 in 4"),
        (5, "3 images are for training, 8 are needed"),
        (11, "7 images are for training, 8 are needed"),
    ],
)
def test_what_is_too_little_is_said_with_the_number_that_is_needed(count, says) -> None:
    found = shortage(*counted(count), SHARES)
    assert found is not None and found[0] == says
    assert f"until about 12 families, now {count}, look different" in found[1] or count < 5


def test_few_images_are_enough_to_train_but_not_for_a_verdict() -> None:
    assert shortage(*counted(12), SHARES) is None
    assert "of 50 test images of 20 families it has 25 of 25; add images, or change" in hardly_judged(
        *counted(100)
    )
    assert hardly_judged(*counted(200)) == ""


def test_the_evaluation_needs_what_prepare_says() -> None:
    assert (MIN_TRAIN, MIN_FAMILIES["train"]) == (conditions.MIN_TRAIN, conditions.MIN_FAMILIES)
    assert JUDGED["test"] == (NEEDS["kid"], INTERVAL_FAMILIES)
    assert JUDGED["train"] == (NEEDS["copies"], NEEDS["recall"])


@given(st.lists(st.text(max_size=2), max_size=60), st.integers(0, 5))
def test_every_family_is_in_exactly_one_split(images, seed) -> None:
    splits = split(images, seed)
    assert set(splits) == set(images) and set(splits.values()) <= set(SPLITS)
    assert not images or "train" in splits.values()
