"""Splits: families stay together, shares come out right, the order of files does not matter."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.splits import SPLITS, assign_splits

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


@pytest.mark.parametrize("count", [3, 4, 10, 19])
def test_three_families_are_enough_for_all_splits(count) -> None:
    assert set(split(list(map(str, range(count)))).values()) == set(SPLITS)


def test_of_two_families_one_is_for_training_and_one_for_test() -> None:
    assert sorted(split(["a", "b"]).values()) == ["test", "train"]


@given(st.lists(st.text(max_size=2), max_size=60), st.integers(0, 5))
def test_every_family_is_in_exactly_one_split(images, seed) -> None:
    splits = split(images, seed)
    assert set(splits) == set(images) and set(splits.values()) <= set(SPLITS)
    assert not images or "train" in splits.values()
