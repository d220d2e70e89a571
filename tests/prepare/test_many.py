"""Many images: little memory for each, and no work again for those that were prepared before."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from pipeline.config.params import parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.data.storage import JsonLines, create_safetensors
from pipeline.prepare import prepare as stage
from pipeline.prepare import validation
from pipeline.prepare.disk_list import CHUNK, DiskList
from pipeline.prepare.ingest import IngestedItem
from pipeline.prepare.intake import find_families, sort_out
from pipeline.prepare.measure import ImageMeasures
from pipeline.prepare.sources.local import LocalTree
from pipeline.prepare.sources.source import Item

MANY = 8_000


def ingested(number: int, cache) -> IngestedItem:
    """An image of its own, as `ingest` returns it; every hundredth is a copy of the one before."""
    name, pixels = (
        f"{number // 1000:04d}/{number:07d}.png",
        f"{1 + number - (number % 100 == 99):016x}{0:048x}",
    )
    phash = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
    measured = ImageMeasures(pixels, 40, 36, "RGB", 120.5, 50.25, 7.5, 900.0, phash, 255, False)
    item = Item(name, f"data/raw/{name}", f"900-{number}", None, "0000", "0000", (f"thing {number}",))
    return IngestedItem(item, cache / f"block-{number // 256}", number % 256, measured, None, size=(32, 32))


def test_a_disk_list_is_a_sequence() -> None:
    numbers = list(range(2 * CHUNK + 3))
    kept = DiskList(iter(numbers))
    assert len(kept) == len(numbers) and list(kept) == numbers and kept == numbers and kept != numbers[:-1]
    assert kept[-1] == numbers[-1] and kept[CHUNK - 2 : CHUNK + 2] == numbers[CHUNK - 2 : CHUNK + 2]
    assert [a + b for a, b in zip(kept, reversed(kept), strict=True)] == [numbers[-1]] * len(numbers)
    with pytest.raises(IndexError):
        kept[len(numbers)]


def test_an_item_takes_little_memory_while_a_set_is_prepared(tmp_path) -> None:
    tracemalloc.start()
    items = DiskList(ingested(number, tmp_path) for number in range(MANY))
    listed = tracemalloc.get_traced_memory()
    result = sort_out(items)
    sorted_out = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listed[1] < 2 * 2**20  # two chunks, however many items
    assert sorted_out / MANY < 400  # bytes; a list of items takes 2,000
    assert result.counts() == {
        "n_in": MANY,
        "n_ok": MANY * 99 // 100,
        "n_quarantined": 0,
        "n_duplicate": MANY // 100,
    }
    assert all(copy.item.id > kept.item.id for copy, kept in result.duplicates)
    assert len(set(find_families(result.ok))) == len(result.ok)


def params_with(tree):
    changes = {"source": "folder", "subset": [], "path": "data/raw", "text_encoder": "label"}
    return parse_params({**tree, "data": {**tree["data"], **changes}})


def write_image(root, number: int) -> None:
    path = root / "data/raw" / ("cats" if number % 2 else "dogs") / f"{number:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_more_files_are_the_only_ones_read_and_the_result_is_that_of_all_at_once(
    tmp_path, tiny_tree, monkeypatch
) -> None:
    whole_report = validation.Report(())
    monkeypatch.setattr(validation, "validate", lambda *_: whole_report)  # which takes seconds
    params, read = params_with(tiny_tree), []
    for number in range(30):
        write_image(tmp_path, number)
    stage.prepare(params, tmp_path, tmp_path / "work")
    for number in (30, 31, 107):
        write_image(tmp_path, number)
    plain = LocalTree.read
    monkeypatch.setattr(
        LocalTree, "read", lambda tree, name, most: read.append(name) or plain(tree, name, most)
    )
    stage.prepare(params, tmp_path, tmp_path / "work")
    assert sorted(read) == ["cats/031.png", "cats/107.png", "dogs/030.png"]
    added = contents(tmp_path / "data/prepared")
    stage.prepare(params, tmp_path, tmp_path / "fresh")
    assert contents(tmp_path / "data/prepared") == added


def test_of_many_images_a_sample_is_validated_and_the_report_says_so(
    tmp_path, tiny_tree, monkeypatch
) -> None:
    seen = []

    def validate(records, resolution, max_tokens, docs, images):
        seen.extend(record.id for record in records)
        return validation.Report((), len(records), images)

    monkeypatch.setattr(validation, "validate", validate)
    monkeypatch.setattr(validation, "MAX_ROWS", 10)
    for number in range(30):
        write_image(tmp_path, number)
    stage.prepare(params_with(tiny_tree), tmp_path, tmp_path / "work")
    dataset = PreparedDataset(tmp_path / "data/prepared")
    assert seen == [row["id"] for row in dataset.rows][::3]
    assert dataset.manifest["meta"]["validation"]["sample"] == 10
    page = (tmp_path / "reports/data_docs/index.html").read_text()
    assert "Of a sample of 10 of 30 images" in page


def test_rows_and_vectors_are_read_where_they_lie(tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n"two"\n')
    assert list(JsonLines(tmp_path / "rows.jsonl")) == [{"a": 1}, "two"]
    arrays = {"tokens": np.arange(30, dtype=np.float16).reshape(5, 6), "mask": np.ones((5, 1), np.uint8)}
    shapes = {"tokens": ("F16", (5, 6)), "mask": ("U8", (5, 1))}
    for name, array in create_safetensors(tmp_path / "ours", shapes).items():
        array[:] = arrays[name]
    save_file(arrays, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours")["mask"].sum() == 5
