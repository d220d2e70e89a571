"""Images in Parquet files: columns, captions, classes, and files that are not as they should be."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import BadData, InputMissing
from pipeline.prepare.framing import Framing
from pipeline.prepare.limits import MAX_BYTES
from pipeline.prepare.sources import parquet
from pipeline.prepare.sources.parquet import Parquet

FRAMING = Framing(16, "crop", (255, 255, 255))


def png(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, columns, classes=None, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if classes:
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    pq.write_table(table, path, **how)
    return path


def structs(count):
    return [{"bytes": png(n), "path": f"{n}.png"} for n in range(count)]


def captions(root):
    return [item.captions for item in Parquet(root, "a.parquet", FRAMING).listing().items]


def test_a_file_as_hugging_face_writes_it_has_images_and_names_of_classes(tmp_path) -> None:
    columns = {"image": structs(3), "label": [1, 0, -1], "noise": [0.0] * 3}
    write(tmp_path / "a.parquet", columns, ["Tabby_cat", "dog"])
    source = Parquet(tmp_path, "a.parquet", FRAMING)
    items = source.listing().items
    assert [(item.id, item.captions, item.group) for item in items] == [
        ("a.parquet:0", ("dog",), "dog"),
        ("a.parquet:1", ("tabby cat",), "tabby cat"),
        ("a.parquet:2", (), ""),
    ]
    assert [source.read(item) for item in items] == [png(n) for n in range(3)]
    assert source.decode(source.read(items[0]), items[0].where).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("name", parquet.IMAGE_COLUMNS)
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary()})])
def test_a_column_of_bytes_may_have_any_of_the_names_for_images(tmp_path, name, kind) -> None:
    value = {"bytes": png()} if pa.types.is_struct(kind) else png()
    write(tmp_path / "a.parquet", {"url": ["x"], name: pa.array([value], kind)})
    source = Parquet(tmp_path, "a.parquet", FRAMING)
    (item,) = source.listing().items
    assert item.captions == () and source.read(item) == png()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": ["a  cat"], "caption": ["x"], "label": [3]}, ("a cat",)),
        ({"caption": [["one", "two", "one"]]}, ("one", "two")),
        ({"captions": [None]}, ()),
        ({"prompt": ["p"]}, ("p",)),
        ({"label": [3]}, ("class 3",)),
        ({"label": ["dog"]}, ("dog",)),
        ({"text": pa.array(["a"]).dictionary_encode()}, ("a",)),
    ],
)
def test_captions_come_from_the_first_column_named_like_one(tmp_path, columns, expected) -> None:
    write(tmp_path / "a.parquet", {"image": structs(1), **columns})
    assert captions(tmp_path) == [expected]


@pytest.mark.parametrize(
    ("columns", "expected", "words"),
    [
        ({"Text": ["a"], "url": ["u"]}, ("a",), ""),
        ({"text": ["a"], "blip_caption": ["b"], "url": ["u"], "text_length": [1]}, ("a",), "blip_caption"),
        ({"label": [3], "alt": [["a", "b"]]}, ("class 3",), "alt"),
        ({"beschreibung": ["a"], "width": [3]}, (), "beschreibung"),
    ],
)
def test_columns_that_may_be_captions_and_are_not_read_are_named(tmp_path, columns, expected, words) -> None:
    write(tmp_path / "a.parquet", {"image": structs(1), **columns})
    found = Parquet(tmp_path, "a.parquet", FRAMING).listing()
    assert found.items[0].captions == expected
    problem = f"E-CAP-012 a.parquet: has columns that may be captions and are not read: {words}. Fix: "
    assert [str(note).startswith(problem) for note in found.notes] == ([True] if words else [])


def test_a_caption_that_is_unusable_flaws_its_row_only(tmp_path) -> None:
    write(tmp_path / "a.parquet", {"image": structs(2), "text": ["x" * 2000, "fine"]})
    bad, good = Parquet(tmp_path, "a.parquet", FRAMING).listing().items
    assert bad.flaw.code == "E-CAP-003" and good.flaw is None
    write(tmp_path / "a.parquet", {"image": structs(1), "text": [1.5]})
    (item,) = Parquet(tmp_path, "a.parquet", FRAMING).listing().items
    assert str(item.flaw).startswith("E-CAP-004 a.parquet:0: has a text that is not text (float)")


def test_a_folder_is_read_file_by_file_in_order_and_any_row_at_any_time(tmp_path) -> None:
    write(tmp_path / "raw" / "train-1.parquet", {"image": [png(n) for n in range(5)]}, row_group_size=2)
    write(tmp_path / "raw" / "sub" / "x:y.parquet", {"image": [png(7)]})
    (tmp_path / "raw" / "README.md").write_text("x")
    source = Parquet(tmp_path, "raw", FRAMING)
    items = source.listing().items
    assert [item.id for item in items] == ["sub/x:y.parquet:0", *(f"train-1.parquet:{n}" for n in range(5))]
    assert items[1].where == "raw/train-1.parquet:0"
    source = pickle.loads(pickle.dumps(source))
    assert source.listing().items == items
    for number in (0, 1, 5, 4, 2, 0, 3):
        assert source.read(items[number]) == png(7 if number == 0 else number - 1)


def test_listing_does_not_read_images_and_reading_keeps_one_row_group(tmp_path, monkeypatch) -> None:
    columns = {"image": [png(n) for n in range(6)], "text": list("abcdef"), "noise": [1] * 6}
    write(tmp_path / "a.parquet", columns, row_group_size=3)
    asked = []
    plain = pq.ParquetFile.read_row_group

    def spy(self, group, columns=None, **more):
        asked.append((group, columns))
        return plain(self, group, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    source = Parquet(tmp_path, "a.parquet", FRAMING)
    items = source.listing().items
    assert asked == [(0, ["text"]), (1, ["text"])]
    asked.clear()
    assert [source.read(item) for item in items] == columns["image"]
    assert asked == [(0, ["image"]), (1, ["image"])]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is empty"),
        ({"bytes": None, "path": None}, "is empty"),
        ({"bytes": b"", "path": None}, "is empty"),
        ({"bytes": None, "path": "/etc/passwd"}, "names the file '/etc/passwd' and holds no bytes"),
    ],
)
def test_a_row_without_an_image_is_bad_data_when_it_is_read(tmp_path, value, problem) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    write(tmp_path / "a.parquet", {"image": pa.array([value, *structs(1)], kind)})
    source = Parquet(tmp_path, "a.parquet", FRAMING)
    first, second = source.listing().items
    with pytest.raises(BadData, match=f"E-IMG-001 a.parquet:0: {problem}"):
        source.read(first)
    assert source.read(second) == png()


def test_an_image_or_a_row_group_that_is_too_large_is_bad_data(tmp_path, monkeypatch) -> None:
    write(tmp_path / "a.parquet", {"image": [bytes(MAX_BYTES + 1)]})
    source = Parquet(tmp_path, "a.parquet", FRAMING)
    (item,) = source.listing().items
    with pytest.raises(BadData, match="E-IMG-002 a.parquet:0: has 67108865 bytes"):
        source.read(item)
    monkeypatch.setattr(parquet, "MAX_GROUP", 1000)
    with pytest.raises(BadData, match="E-PAR-003 a.parquet: has a row group"):
        Parquet(tmp_path, "a.parquet", FRAMING).read(item)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"pixels": [b"x"]}, "has no column of images, but pixels"),
        ({"image": ["https://example.org/a.png"]}, "column 'image' holds string, not the bytes of files"),
        ({"image": [{"path": "a.png"}]}, "column 'image' holds struct"),
        ({"image": [[1, 2, 3]]}, "column 'image' holds list"),
    ],
)
def test_a_file_without_a_column_of_images_is_one_line(tmp_path, columns, problem) -> None:
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(BadData, match=f"E-PAR-002 a.parquet: {problem}"):
        captions(tmp_path)


def test_a_damaged_file_is_one_line(tmp_path) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(2), "text": ["a", "b"]})
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-5], whole[: len(whole) // 2], b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(BadData, match="E-PAR-001 a.parquet: is damaged or cut off") as caught:
            captions(tmp_path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "about", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": 3}}}}']
)
def test_odd_notes_in_a_schema_leave_numbers_for_names(tmp_path, about) -> None:
    table = pa.table({"image": structs(1), "label": [0]}).replace_schema_metadata({"huggingface": about})
    pq.write_table(table, tmp_path / "a.parquet")
    assert captions(tmp_path) == [("class 0",)]


def test_a_link_in_a_folder_is_not_followed(tmp_path) -> None:
    write(tmp_path / "outside.parquet", {"image": structs(1)})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.parquet").symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(BadData, match="E-IMG-014 raw/a.parquet"):
        Parquet(tmp_path, "raw", FRAMING).listing()


def test_what_is_not_there_or_empty_is_input_missing(tmp_path) -> None:
    with pytest.raises(InputMissing, match="E-INP-064 a.parquet: is not there"):
        Parquet(tmp_path, "a.parquet", FRAMING)
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputMissing, match="E-INP-065 raw: holds no images"):
        Parquet(tmp_path, "raw", FRAMING).listing()
    write(tmp_path / "raw" / "a.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(InputMissing, match="E-INP-065 raw: holds no images"):
        Parquet(tmp_path, "raw", FRAMING).listing()
