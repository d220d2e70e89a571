"""Splits: families stay together, shares come out right, the order of files does not matter."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.splits import FRACTIONS, assign_splits


def shares(bases, seed=0):
    splits = assign_splits(bases, seed)
    return Counter(splits[base] for base in bases)


def test_shares_are_85_5_10_of_the_images() -> None:
    assert shares([str(number) for number in range(1000)]) == {"train": 850, "val": 50, "test": 100}


def test_big_families_do_not_upset_the_shares() -> None:
    bases = (
        [f"big{n // 18}" for n in range(180)]
        + [f"six{n // 6}" for n in range(240)]
        + list(map(str, range(200)))
    )
    found = shares(bases)
    for split, fraction in FRACTIONS.items():
        assert abs(found[split] - fraction * len(bases)) <= 1


def test_the_order_of_the_images_does_not_matter_and_the_seed_does() -> None:
    bases = [str(number) for number in range(200)]
    assert assign_splits(bases, 0) == assign_splits(bases[::-1], 0)
    assert assign_splits(bases, 0) != assign_splits(bases, 1)


@given(st.lists(st.text(max_size=2), max_size=60), st.integers(0, 5))
def test_every_family_is_in_exactly_one_split(bases, seed) -> None:
    splits = assign_splits(bases, seed)
    assert set(splits) == set(bases) and set(splits.values()) <= set(FRACTIONS)
    assert not bases or "train" in splits.values()
