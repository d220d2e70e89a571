"""Campaigns of faults at their smallest: a race, crashes, tampering and bad requests; results that go on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import forks, results, stores
from benchmarks.chaos.crashes import crash
from benchmarks.chaos.project import make_project
from benchmarks.chaos.races import race
from benchmarks.chaos.requests import Case, cases, promote_here, refused
from benchmarks.chaos.results import Batch, Findings
from benchmarks.chaos.stores import Store
from benchmarks.chaos.tampering import CHANGE, tamper
from pipeline.errors import InputMissing


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, after a promotion whose imports all forks share."""
    return stores.rehearse(tmp_path_factory.mktemp("chaos") / "rehearsal")


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    """A store of one's own."""
    return stores.new_sqlite(tmp_path / "store", template)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (lambda *where: race(0, *where, rounds=1, promoters=4), {"rounds": 1, "promotions": 4}),
        (lambda *where: crash(0, *where, crashes=2), {"promote killed": 2}),
        (lambda *where: tamper(0, *where, changes=len(CHANGE)), {"changes": 10, "refused": 60}),
    ],
    ids=["race", "crash", "tamper"],
)
def test_a_small_campaign_breaks_no_promise(
    attack: Callable[[Path, Store], Findings], expected: dict[str, int], store: Store, tmp_path: Path
) -> None:
    found = attack(tmp_path, store)
    assert found.failures == []
    assert expected.items() <= found.counts.items()


def test_bad_requests_are_refused_in_one_line_and_one_that_is_not_is_found(
    store: Store, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    make_project(checkout, 0)
    (checkout / "dvc.yaml").touch()
    (checkout / "stages").mkdir()
    where = {"log": tmp_path / "log", "environment": store.environment}
    forks.call(promote_here, checkout, **where)
    some = cases()[::25]
    found = forks.call(refused, checkout, [*some, Case("fine", ("history",), frozenset({66}))], **where)
    assert [line.split(":")[0] for line in found.failures] == ["fine"], found.failures
    assert found.counts["refused in one line"] == len(some) > 20


def test_batches_go_on_after_a_line_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    batches = [Batch("race", "sqlite", seed, {"rounds": 10}, [], 1.0, 2.0, "c0ffee") for seed in (0, 2)]
    results.append(file, batches[0])
    file.write_text(file.read_text() + '{"campaign": "ra')
    results.append(file, batches[1])
    assert results.read(file) == batches
    assert chaos.fresh(tmp_path, "race", "sqlite", 2) == [1, 3]
    assert chaos.fresh(tmp_path, "race", "sqlite", None) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert chaos.fresh(tmp_path, "crash", "postgresql", None) == [0, 1, 2, 3, 4]
    assert results.table(batches).splitlines()[-1] == "| race | sqlite | 0, 2 | 20 rounds | 0 | 4 s |"


def test_a_missing_postgresql_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "DEBIAN", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputMissing, match="E-INP-043 PostgreSQL: initdb is neither"):
        with stores.own_server(tmp_path / "server"):
            pass
