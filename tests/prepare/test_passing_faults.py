"""A fault that passes is not a verdict: nothing is lost by a share that was away, or a decoder that was killed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from deeds import Deadly, Faulty, gone, moved, silent, stale
from PIL import Image

from pipeline.errors import BadData, Busy
from pipeline.prepare import ingest
from pipeline.prepare.blocks import Layout
from pipeline.prepare.framing import Framing
from pipeline.prepare.intake import sort_out
from pipeline.prepare.reports import attempts_in_words
from pipeline.prepare.sources import patience
from pipeline.prepare.sources.archive import Archive
from pipeline.prepare.sources.folder import Folder

LAYOUT = Layout(16, 8, "raw")
FRAMING = Framing(16, "crop", (255, 255, 255))
COUNT = 80


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))


@pytest.fixture()
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


FAULTS = [gone, stale, silent, moved]


def take(source, cache, mapper=ingest.run_locally):
    return ingest.ingest(source, source.listing().items, LAYOUT, cache, mapper, 1, lambda done, total: None)


def usable(taken) -> int:
    return sum(each.measured is not None for each in taken)


@pytest.mark.parametrize("fail", FAULTS)
def test_what_could_not_be_read_is_there_again_in_the_next_run(raw, tmp_path, fail) -> None:
    first = take(Faulty(tmp_path, (3, 40, 79), fail), tmp_path / "cache")
    assert usable(first) == COUNT - 3
    (line,) = attempts_in_words(sort_out(first))
    assert line.startswith("3 could not be read or decoded now") and "raw/003.png" in line
    second = take(Faulty(tmp_path), tmp_path / "cache")
    assert usable(second) == COUNT
    assert attempts_in_words(sort_out(second)) == [
        "3 that could not be read or decoded before are there again: raw/003.png, raw/040.png, raw/079.png"
    ]
    for _ in range(2):
        third = take(Faulty(tmp_path), tmp_path / "cache", lambda make, tasks: pytest.fail("nothing to do"))
        assert usable(third) == COUNT and attempts_in_words(sort_out(third)) == []
    whole = take(Faulty(tmp_path), tmp_path / "other")
    assert [(each.item, each.measured) for each in third] == [(each.item, each.measured) for each in whole]


def test_a_fault_that_lasts_is_tried_in_every_run(raw, tmp_path) -> None:
    for _ in range(3):
        taken = take(Faulty(tmp_path, (1, 5), stale), tmp_path / "cache")
        assert usable(taken) == COUNT - 2
        assert [each.problem.code for each in taken if each.problem] == ["E-IMG-012"] * 2
        assert len(attempts_in_words(sort_out(taken))) == 1
    assert usable(take(Faulty(tmp_path), tmp_path / "cache")) == COUNT


@pytest.mark.parametrize("fail", FAULTS)
def test_a_fault_of_a_moment_is_not_even_seen(raw, tmp_path, fail) -> None:
    taken = take(Faulty(tmp_path, range(COUNT), fail, times=2), tmp_path / "cache")
    assert usable(taken) == COUNT and attempts_in_words(sort_out(taken)) == []


@pytest.mark.parametrize("fail", FAULTS)
@pytest.mark.parametrize("faults", [range(COUNT), range(30, 36), range(70, COUNT)])
def test_a_source_that_fails_many_times_in_a_row_is_away(raw, tmp_path, fail, faults) -> None:
    with pytest.raises(
        Busy, match=f"E-BUSY-060 raw/{faults[5]:03d}.png: .*, like 5 files before it"
    ) as caught:
        take(Faulty(tmp_path, faults, fail), tmp_path / "cache")
    assert caught.value.exit_status == 75
    assert usable(take(Faulty(tmp_path), tmp_path / "cache")) == COUNT


def test_five_in_a_row_are_few(raw, tmp_path) -> None:
    assert usable(take(Faulty(tmp_path, range(30, 35), gone), tmp_path / "cache")) == COUNT - 5


def test_what_a_run_kept_before_the_source_went_away_is_not_done_again(raw, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ingest, "BLOCK_ITEMS", 20)
    with pytest.raises(Busy):
        take(Faulty(tmp_path, range(60, COUNT), gone), tmp_path / "cache")
    asked = []

    def mapper(make, tasks):
        asked.extend(tasks)
        return ingest.run_locally(make, tasks)

    assert usable(take(Faulty(tmp_path), tmp_path / "cache", mapper)) == COUNT
    assert [len(task) for task in asked] == [20]


def test_no_permission_is_not_waited_for(raw, tmp_path) -> None:
    def denied(item):
        raise PermissionError(13, "Permission denied", item.where)

    with pytest.raises(PermissionError):
        take(Faulty(tmp_path, (3,), denied), tmp_path / "cache")


def test_a_verdict_on_bytes_is_kept(raw, tmp_path) -> None:
    for name in ("000", "010", "020"):
        (raw / f"{name}.png").write_bytes((raw / f"{name}.png").read_bytes()[:100])
    (raw / "030.png").write_bytes(b"")
    with open(raw / "040.png", "r+b") as file:
        file.truncate(2**40)
    first = take(Faulty(tmp_path), tmp_path / "cache")
    assert usable(first) == COUNT - 5 and attempts_in_words(sort_out(first)) == []
    again = take(Faulty(tmp_path), tmp_path / "cache", lambda make, tasks: pytest.fail("nothing to do"))
    assert [str(each.problem) for each in again] == [str(each.problem) for each in first]


# Decoders.


@pytest.mark.parametrize(
    ("how", "code"),
    [("SIGKILL", "E-IMG-013"), ("SIGSEGV", "E-IMG-008"), ("slow", "E-IMG-009"), ("large", "E-IMG-010")],
)
def test_a_lost_decoder_is_no_verdict(raw, tmp_path, how, code) -> None:
    names = ["001.png", "002.png"][: 1 if how == "slow" else 2]
    (tmp_path / "deadly.json").write_text(json.dumps(names))
    first = take(Deadly(tmp_path, how), tmp_path / "cache")
    assert [each.problem.code for each in first if each.problem] == [code] * len(names)
    (tmp_path / "deadly.json").write_text("[]")
    second = take(Deadly(tmp_path, how), tmp_path / "cache")
    assert usable(second) == COUNT
    assert f"{len(names)} that could not be read or decoded before" in attempts_in_words(sort_out(second))[0]


def test_decoders_that_are_killed_again_and_again_stop_the_stage(raw, tmp_path) -> None:
    (tmp_path / "deadly.json").write_text(json.dumps([f"{number:03d}.png" for number in range(20, 26)]))
    with pytest.raises(
        Busy, match="E-BUSY-061 raw/025.png: its decoder was killed from outside, like those of 5"
    ):
        take(Deadly(tmp_path, "SIGKILL"), tmp_path / "cache")


# Captions and archives.


def test_a_caption_that_was_mended_frees_its_image(raw, tmp_path) -> None:
    (raw / "003.txt").write_bytes(b"caf\xe9")
    first = take(Folder(tmp_path, "raw", FRAMING), tmp_path / "cache")
    assert usable(first) == COUNT - 1
    (raw / "003.txt").write_text("café", "utf-8")
    second = take(Folder(tmp_path, "raw", FRAMING), tmp_path / "cache")
    assert usable(second) == COUNT
    assert second[3].item.captions == ("café",)


def test_a_member_of_an_archive_that_was_fetched_again_is_read_again(raw, tmp_path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(raw.glob("*.png")):
            archive.write(path, path.name)
    good = (tmp_path / "a.zip").read_bytes()
    bad = bytearray(good)
    bad[len((raw / "000.png").read_bytes()) // 2] ^= 1
    (tmp_path / "a.zip").write_bytes(bytes(bad))
    first = take(Archive(tmp_path, "a.zip", FRAMING), tmp_path / "cache")
    assert [each.problem.code for each in first if each.problem] == ["E-ARC-017"]
    (tmp_path / "a.zip").write_bytes(good)
    assert usable(take(Archive(tmp_path, "a.zip", FRAMING), tmp_path / "cache")) == COUNT


def test_captions_that_cannot_be_read_are_a_source_that_is_away(raw, tmp_path, monkeypatch) -> None:
    for number in range(COUNT):
        (raw / f"{number:03d}.txt").write_text(f"caption {number}")
    source = Folder(tmp_path, "raw", FRAMING)
    monkeypatch.setattr(source._tree, "read", lambda name, limit: gone_name(name))
    with pytest.raises(Busy, match="E-BUSY-060"):
        source.listing()


def test_a_caption_that_cannot_be_read_is_not_a_missing_one(raw, tmp_path, monkeypatch) -> None:
    (raw / "003.txt").write_text("a caption")
    source = Folder(tmp_path, "raw", FRAMING)
    monkeypatch.setattr(source._tree, "read", lambda name, limit: gone_name(name))
    flawed = [item for item in source.listing().items if item.flaw]
    assert [(item.id, item.flaw.code) for item in flawed] == [("003.png", "E-CAP-001")]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_that_cannot_be_read_is_a_source_that_is_away(raw, tmp_path, monkeypatch, name) -> None:
    (raw / name).write_bytes(b"x")
    source = Folder(tmp_path, "raw", FRAMING)
    monkeypatch.setattr(source._tree, "read", lambda name, limit: gone_name(name))
    with pytest.raises(Busy, match=f"E-BUSY-060 raw/{name}"):
        source.listing()


def gone_name(name):
    raise OSError(5, "Input/output error", name)


def test_a_file_that_is_cut_off_while_it_is_read_is_not_judged(raw, tmp_path, monkeypatch) -> None:
    source = Folder(tmp_path, "raw", FRAMING)
    item = source.listing().items[0]
    real = os.lstat

    def larger(path):
        status = real(path)
        return os.stat_result((*status[:6], status.st_size + 10, *status[7:10]))

    monkeypatch.setattr(os, "lstat", larger)
    with pytest.raises(OSError, match="of .* bytes could be read"):
        source.read(item)
    with pytest.raises(BadData, match="E-IMG-012 raw/000.png: cannot be read"):
        patience.Patience().read(lambda: source.read(item), item.where)
