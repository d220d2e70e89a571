"""Timing in turns, and tables of it."""

from __future__ import annotations

from benchmarks import measure


def test_runs_take_turns_after_a_round_that_does_not_count() -> None:
    calls = []
    runs = {name: lambda name=name: float(calls.append(name) or len(calls)) for name in "ab"}
    assert measure.interleave(runs, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert calls == list("ababab")


def test_a_ratio_is_taken_within_each_round() -> None:
    assert measure.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == 2.0
    assert measure.show([90.0, 100.0, 110.0]) == "100 ±10%"


def test_a_table_is_aligned() -> None:
    assert measure.table(["a", "bcd"], [["long", "1"]]) == "| a    | bcd |\n| ---- | --: |\n| long |   1 |\n"


def test_what_lacks_a_package_takes_no_part() -> None:
    def make() -> None:
        import no_such_package  # noqa: F401

    assert measure.build({"there": lambda: 1, "absent": make}) == {"there": 1}
