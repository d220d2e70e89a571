"""Tables of decoding, preparation, loading and storage at their smallest, with the peers that are installed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from benchmarks.data import decode, fetch, load, many, prepare, store, wait
from pipeline.prepare import validation
from tests.benchmarks.tables import lines


def test_decode_table_has_every_contender() -> None:
    text = decode.decode_table(count=3, repeats=1, px=64)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == list(decode.DECODERS)


def test_prepare_table_counts_what_is_decoded_again(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "Bound", lambda cores: nullcontext(lambda work, *args: work(*args)))
    monkeypatch.setattr(validation, "validate", lambda *_: validation.Report(()))  # which takes seconds
    text = prepare.prepare_table(count=60, repeats=1, px=64, cores=(1,))
    assert "1 decoded" in text
    assert "Pillow, np.save" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_load_table_has_every_contender() -> None:
    text = load.load_table(count=128, repeats=1, side=16, seconds=0.001)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == list(load.LOADERS)


def test_fetch_table_has_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FILES": 4, "PER_FILE": 32, "FETCH": 0, "TRAINING": 0, "SOME": 2}.items():
        monkeypatch.setattr(fetch, name, value)
    rows = [line.split("|") for line in lines(fetch.fetch_table())[2:]]
    assert len(rows) == len(fetch.CASES)
    assert rows[0][3].strip() == "0", "what fits is fetched once"


def test_wait_table_has_both_denoising_stages() -> None:
    text = wait.wait_table(count=24, repeats=1)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == ["pretrain", "finetune"]


def test_store_table_has_every_kind_size_and_codec() -> None:
    text = store.store_table(count=1, repeats=1)
    assert len(lines(text)) == 2 + 2 * 2 * len(store.CODECS)


def test_many_files_are_written_once_and_their_costs_have_a_line_each(tmp_path) -> None:
    for _ in range(2):
        many.write_files(tmp_path / "raw", range(3))
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".jpg", ".png", *[".txt"] * 3, ".webp"]
    cost = many.Cost(10.0, 900.0)
    costs = {count: dict.fromkeys((*many.RUNS, "add 1%"), cost) for count in (30, 300)}
    assert len(lines(many.costs_table(costs))) == 4
    many.plot(costs, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000
