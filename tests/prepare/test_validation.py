"""The gate: each fault is found by its own expectation; severities decide; digests hold no time."""

from dataclasses import replace

import pytest

from pipeline.prepare.validation import Record, _expectations, validate, write_index_page
from pipeline.prepare.wording import failure

GOOD = [
    Record(
        id=f"i{n}", split=("train", "train", "val", "test")[n % 4], family=f"b{n}", group="g", subgroup="s",
        caption=f"face {n}", num_captions=1, caption_flaws="", tokens=4, near_elsewhere=0, aspect=1.0, side=64,
        pixels=f"p{n}", width=64, height=64, mode="RGB", mean=200.0, std=50.0, entropy=2.0, sharpness=90.0,
        phash=f"{n:016x}", peak=255, several=False,
    )
    for n in range(40)
]  # fmt: skip


def faults(records):
    report = validate(records, 64, 16)
    return {outcome.name for outcome in report.outcomes if not outcome.success}, report


def test_good_data_pass_and_docs_are_written(tmp_path, capfd) -> None:
    report = validate(GOOD, 64, 16, tmp_path)
    assert report.success and not report.failed("warning")
    assert report.as_meta() == {"digest": report.digest, "success": True, "warnings": []}
    assert (tmp_path / "details" / "index.html").is_file()
    assert capfd.readouterr().out == ""


def test_an_empty_set_fails() -> None:
    names, report = faults([])
    assert "there is at least one image" in names and not report.success


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"id": "i1"}, "ids are unique"),
        ({"pixels": "p1"}, "no two images have equal pixels"),
        ({"split": "holdout"}, "every image is in train, val or test"),
        ({"family": "b2", "split": "train"}, "variants of one motif are in one split"),
        ({"caption": "x" * 1001}, "captions have 1 to 1000 characters"),
    ],
)
def test_each_critical_fault_is_found(change, name) -> None:
    names, report = faults([replace(GOOD[0], **change), *GOOD[1:]])
    assert name in names and not report.success


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"std": 0.5}, "no image is blank"),
        ({"entropy": 0.01}, "images are not nearly blank"),
        ({"sharpness": 0.1}, "images are not blurred"),
        ({"side": 40}, "files have at least 64 px a side, so that none is enlarged"),
        ({"aspect": 4.5}, "files are at most 3 times as long as wide"),
        ({"mode": "CMYK"}, "files have a usual pixel format"),
        ({"near_elsewhere": 1}, "near duplicates are in one split"),
        ({"caption_flaws": "markup"}, "captions read like text"),
        ({"tokens": 40}, "captions fit 16 tokens"),
    ],
)
def test_each_warning_is_found_and_lets_the_data_pass(change, name) -> None:
    names, report = faults([replace(GOOD[0], **change), *GOOD[1:]])
    assert names == {name} and report.success


def test_examples_of_what_fails_are_shown(tmp_path) -> None:
    report = validate([replace(GOOD[0], sharpness=0.0), *GOOD[1:]], 64, 16)
    write_index_page(tmp_path, report, "folder", {"n_in": 40}, {}, None, {"i0": "data:image/png;base64,AA"})
    page = (tmp_path / "index.html").read_text()
    assert '<img src="data:image/png;base64,AA"' in page and "<figcaption>i0</figcaption>" in page


def test_what_is_only_worth_a_warning_lets_the_data_pass() -> None:
    first = replace(GOOD[0], std=0.0, caption=None, num_captions=0)
    names, report = faults([first, replace(GOOD[1], tokens=99), *GOOD[2:]])
    assert names == {"no image is blank", "every image has a caption", "captions fit 16 tokens"}
    assert report.success and set(report.as_meta()["warnings"]) == names
    (blank,) = [outcome for outcome in report.outcomes if outcome.name == "no image is blank"]
    assert (blank.unexpected, blank.examples) == (1, ("i0",))


def test_many_blank_images_are_critical() -> None:
    names, report = faults([replace(record, std=0.0) for record in GOOD[:8]] + GOOD[8:])
    assert "at most 5% are blank" in names and not report.success


def test_equal_data_give_equal_digests_and_other_data_others() -> None:
    assert validate(GOOD, 64, 16).digest == validate(GOOD, 64, 16).digest
    assert validate(GOOD, 64, 16).digest != validate(GOOD[:-1], 64, 16).digest


def test_the_index_page_escapes_what_came_from_data(tmp_path) -> None:
    report = validate([replace(GOOD[0], id="<script>"), replace(GOOD[1], id="<script>"), *GOOD[2:]], 64, 16)
    write_index_page(tmp_path, report, "folder", {"n_in": 40}, {"E-IMG-005": ["<b>.png: bad"]})
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "The data did not pass" in page


def test_every_failure_reads_as_what_is_wrong() -> None:
    for expectation in _expectations(128, 16):
        name = expectation.meta["name"]
        words = failure(name, 3, ("a", "b", "c"))
        assert words != name and words.endswith(" (a, b, c)")
    assert failure("every image has a caption", 3, ("a", "b")) == "3 images have no caption (a, b and 1 more)"
    assert failure("every image has a caption", 1, ("a",)) == "1 image has no caption (a)"
    assert failure("at most 5% are blank", 9, ()) == "9 images are blank, more than 5%"
    assert failure("captions fit 16 tokens", 1, ()).startswith("1 image has a caption of more than 16 tokens")
