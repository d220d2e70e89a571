"""A user's own folder: captions in every layout, groups, splits, and files that do not belong."""

import io
import json
import os
import pickle
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import BadData, InputMissing, StorageError
from pipeline.prepare.framing import Framing
from pipeline.prepare.limits import MAX_BYTES
from pipeline.prepare.sources.files import original, printable
from pipeline.prepare.sources.folder import Folder
from pipeline.prepare.sources.metadata import read_metadata

FRAMING = Framing(16, "crop", (255, 255, 255))


def png(seed=0, size=(40, 30)):
    draw = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))
    return path


def listing(root):
    return Folder(root, "raw", FRAMING).listing()


def captions(root):
    return {item.id: item.captions for item in listing(root).items}


def test_a_missing_or_empty_folder_is_input_missing(tmp_path) -> None:
    with pytest.raises(InputMissing, match="raw: is not a folder"):
        listing(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "README.md").write_text("put images here")
    with pytest.raises(InputMissing, match="raw: holds no images"):
        listing(tmp_path)


def test_captions_come_from_metadata_then_text_files_then_folder_names(tmp_path) -> None:
    for name in ("a.png", "cats/b.png", "cats/c.png", "big_dogs/d.jpg"):
        picture(tmp_path / "raw" / name)
    rows = [{"file_name": "cats/b.png", "text": ["a grey  cat", "tom"]}]
    (tmp_path / "raw" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "raw" / "cats" / "b.txt").write_text("not used")
    (tmp_path / "raw" / "cats" / "c.txt").write_text("\ufeffa sleeping cat\n\nsleepy\n")
    assert captions(tmp_path) == {
        "a.png": (),
        "big_dogs/d.jpg": ("big dogs",),
        "cats/b.png": ("a grey cat", "tom"),
        "cats/c.png": ("a sleeping cat", "sleepy"),
    }
    (note,) = listing(tmp_path).notes
    assert str(note).startswith("E-CAP-010 raw: 1 images have a caption file, which is not used")


def test_kohya_folders_lose_their_number_and_txt_comes_before_caption(tmp_path) -> None:
    for name in ("10_red cat/a.png", "10_red cat/b.png", "3_x/c.png"):
        picture(tmp_path / "raw" / name)
    (tmp_path / "raw" / "10_red cat" / "b.caption").write_text("second")
    (tmp_path / "raw" / "3_x" / "c.caption").write_text("second")
    (tmp_path / "raw" / "3_x" / "c.txt").write_text("first")
    assert captions(tmp_path) == {
        "10_red cat/a.png": ("red cat",),
        "10_red cat/b.png": ("second",),
        "3_x/c.png": ("first",),
    }


def test_splits_at_the_top_are_neither_captions_nor_groups(tmp_path) -> None:
    for name in ("train/cats/a.png", "validation/dogs/b.png", "test/c.png"):
        picture(tmp_path / "raw" / name)
    found = {item.id: (item.captions, item.group, item.subgroup) for item in listing(tmp_path).items}
    assert found == {
        "test/c.png": ((), "", ""),
        "train/cats/a.png": (("cats",), "cats", "cats"),
        "validation/dogs/b.png": (("dogs",), "dogs", "dogs"),
    }


def test_a_train_beside_a_plane_is_a_class(tmp_path) -> None:
    picture(tmp_path / "raw" / "train" / "a.png")
    picture(tmp_path / "raw" / "plane" / "b.png")
    assert captions(tmp_path) == {"plane/b.png": ("plane",), "train/a.png": ("train",)}


def table(columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", b'{"image_file_name": "cats/a.png", "prompt": "a cat, asleep"}\n'),
        ("metadata.csv", b'\xef\xbb\xbffile_name,text,more\r\ncats/a.png,"a cat, asleep",1\r\n'),
        ("metadata.parquet", table({"file_name": ["cats/a.png"], "caption": ["a cat, asleep"]})),
        ("metadata.parquet", table({"file_name": ["cats/a.png"], "text": [["a cat, asleep"]], "w": [3]})),
    ],
)
def test_metadata_may_be_json_lines_csv_or_parquet(tmp_path, name, content) -> None:
    picture(tmp_path / "raw" / "cats" / "a.png")
    (tmp_path / "raw" / name).write_bytes(content)
    assert captions(tmp_path) == {"cats/a.png": ("a cat, asleep",)}


def test_a_class_number_is_a_caption_and_no_text_is_none() -> None:
    content = b'{"file_name": "a", "label": 3}\n{"file_name": "b", "text": null}\n{"file_name": "c"}'
    assert read_metadata(content, "metadata.jsonl") == {"a": ["class 3"], "b": [], "c": []}


def test_the_nearest_metadata_counts_and_names_that_are_not_there_are_noted(tmp_path) -> None:
    picture(tmp_path / "raw" / "cats" / "b.png")
    (tmp_path / "raw" / "metadata.jsonl").write_text('{"file_name": "cats/b.png", "text": "far"}')
    near = '{"file_name": "b.png", "text": "near"}\n{"file_name": "../../secret", "text": "x"}'
    (tmp_path / "raw" / "cats" / "metadata.jsonl").write_text(near)
    (tmp_path / "raw" / "cats" / "metadata.csv").write_text("file_name,text\nb.png,later\n")
    found = listing(tmp_path)
    assert found.items[0].captions == ("near",)
    assert [note.code for note in found.notes] == ["E-CAP-005", "E-CAP-010", "E-CAP-010"]


def test_a_text_file_without_its_image_is_noted(tmp_path) -> None:
    picture(tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / "b.caption").write_text("of what?")
    (note,) = listing(tmp_path).notes
    assert str(note).startswith("E-CAP-005 raw/b.caption: has no image of its name beside it. Fix: ")


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"text": "x"}', '{"file_name": "a", "text": 3}', "\xff", "[" * 9999, '{"file_name": ""}'],
)
def test_a_bad_line_of_metadata_is_named(line) -> None:
    content = b'{"file_name": "a.png", "text": "ok"}\n' + line.encode("latin-1")
    with pytest.raises(BadData, match="E-CAP-004 raw/metadata.jsonl line 2: "):
        read_metadata(content, "raw/metadata.jsonl")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"name,text\na.png,x\n", 2),
        (b"file_name,text\na.png,x\n\xff,y\n", 3),
        (b'file_name,text\na.png,"x\n', 2),
        (b"file_name,text\na.png," + b"x" * 200_000, 2),
        (b"file_name,text\n,x\n", 2),
    ],
)
def test_a_bad_line_of_csv_is_named(content, line) -> None:
    with pytest.raises(BadData, match=f"E-CAP-004 raw/metadata.csv line {line}: "):
        read_metadata(content, "raw/metadata.csv")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1", table({"a": [1]})])
def test_a_bad_parquet_of_metadata_is_one_line(content) -> None:
    with pytest.raises(BadData, match="E-CAP-004 raw/metadata.parquet") as caught:
        read_metadata(content, "raw/metadata.parquet")
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_plain_file_stops(tmp_path) -> None:
    picture(tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / "metadata.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(BadData, match="E-CAP-004 raw/metadata.jsonl: is not a plain file"):
        listing(tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\xff\xfea", "E-CAP-002"), (b"x" * 70_000, "E-CAP-003"), (b"x" * 2000, "E-CAP-003")],
)
def test_an_unusable_text_file_flaws_its_image(tmp_path, content, code, suffix) -> None:
    picture(tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / f"a{suffix}").write_bytes(content)
    (item,) = listing(tmp_path).items
    assert item.flaw.code == code


def test_a_linked_text_file_is_not_read(tmp_path) -> None:
    picture(tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / "a.txt").symlink_to("/etc/hostname")
    (item,) = listing(tmp_path).items
    assert item.flaw.code == "E-CAP-001" and item.captions == ()


def test_sub_folders_are_groups(tmp_path) -> None:
    picture(tmp_path / "raw" / "animals" / "cats" / "a.png")
    (item,) = listing(tmp_path).items
    assert (item.group, item.subgroup, item.family) == ("animals", "animals/cats", None)


def test_hidden_files_and_documents_are_passed_over_and_links_not_followed(tmp_path) -> None:
    raw = tmp_path / "raw"
    picture(raw / "a.png")
    for name in (".hidden/b.png", "__MACOSX/c.png", "Thumbs.db"):
        picture(raw / name)
    (raw / ".DS_Store").write_bytes(b"x")
    (raw / "notes.md").write_text("x")
    picture(tmp_path / "outside" / "c.png")
    (raw / "linked").symlink_to(tmp_path / "outside")
    (raw / "passwd.png").symlink_to("/etc/passwd")
    (raw / "loop.png").symlink_to("loop.png")
    os.mkfifo(raw / "pipe.png")
    source = Folder(tmp_path, "raw", FRAMING)
    items = {item.id: item for item in source.listing().items}
    odd = ("linked", "loop.png", "passwd.png", "pipe.png")
    assert set(items) == {"a.png", *odd} and items["a.png"].flaw is None
    framed = source.decode(source.read(items["a.png"]), "raw/a.png")
    assert framed.pixels.shape == (16, 16, 3)
    for name in odd:
        code = "E-IMG-014" if name in {"linked", "passwd.png"} else "E-IMG-007"
        assert items[name].flaw.code == code
        with pytest.raises(BadData, match=code):
            source.read(items[name])
    assert source.listing().passed_over == {".md": 1, "Thumbs.db": 1, "__MACOSX": 1, "hidden": 2}


def test_a_file_that_is_too_large_or_has_gone_is_bad_data(tmp_path) -> None:
    large, gone = picture(tmp_path / "raw" / "a.png"), picture(tmp_path / "raw" / "b.png")
    os.truncate(large, MAX_BYTES + 1)
    source = Folder(tmp_path, "raw", FRAMING)
    first, second = source.listing().items
    gone.unlink()
    with pytest.raises(BadData, match="E-IMG-002 raw/a.png: has 67108865 bytes"):
        source.read(first)
    with pytest.raises(BadData, match="E-IMG-011 raw/b.png: is no longer there"):
        source.read(second)


ODD = (b"a\nb.png", b"\xff.png", b"-rf.png", b"a\\nb.png", "\u202egnp.a.png".encode(), b"x" * 251 + b".png")


def test_odd_file_names_become_plain_ids_and_are_still_read(tmp_path) -> None:
    raw = tmp_path / "raw"
    for seed, name in enumerate(ODD):
        picture(raw / os.fsdecode(name), seed)
    source = pickle.loads(pickle.dumps(Folder(tmp_path, "raw", FRAMING)))
    items = {item.id: item for item in source.listing().items}
    assert set(items) == {
        "-rf.png", r"\xff.png", r"a\nb.png", r"a\\nb.png", r"\u202egnp.a.png", "x" * 251 + ".png",
    }  # fmt: skip
    assert source.read(items[r"a\nb.png"]) == png(0)
    assert source.read(items[r"\xff.png"]) == png(1)
    assert source.read(items[r"a\\nb.png"]) == png(3)


@given(st.text(st.characters(exclude_categories=())))
def test_a_printable_name_is_printable_and_names_one_file(name) -> None:
    shown = printable(name)
    assert shown.isprintable() and shown == shown.encode("utf-8").decode("utf-8")
    assert original(shown) == name


def test_the_order_is_that_of_names_and_a_version_changes_with_its_file(tmp_path) -> None:
    for name in ("b.png", "a/z.png", "a.png", "B.png"):
        picture(tmp_path / "raw" / name)
    before = listing(tmp_path).items
    assert [item.id for item in before] == ["B.png", "a.png", "a/z.png", "b.png"]
    assert listing(tmp_path).items == before
    os.utime(tmp_path / "raw" / "a.png", ns=(1, 1))
    changed = [
        new.id for old, new in zip(before, listing(tmp_path).items, strict=True) if old.version != new.version
    ]
    assert changed == ["a.png"]


@pytest.fixture
def store():
    """A folder in fsspec's store in memory, and its URL."""
    name = uuid.uuid4().hex
    memory = fsspec.filesystem("memory")
    for path, content in {
        "cats/a.png": png(1),
        "cats/a.txt": b"a cat",
        "dogs/b.png": png(2),
        ".hidden/c.png": png(3),
        "dogs/.DS_Store": b"x",
    }.items():
        memory.pipe_file(f"/{name}/{path}", content)
    yield f"memory://{name}"
    memory.rm(f"/{name}", recursive=True)


def test_a_url_is_read_like_a_folder(tmp_path, store) -> None:
    source = Folder(tmp_path, store + "/", FRAMING)
    found = source.listing()
    source = pickle.loads(pickle.dumps(source))
    assert source.listing() == found
    assert {item.id: item.captions for item in found.items} == {
        "cats/a.png": ("a cat",),
        "dogs/b.png": ("dogs",),
    }
    assert [source.read(item) for item in found.items] == [png(1), png(2)]
    assert found.items[0].where == f"{store}/cats/a.png"


def test_a_url_notices_changes_large_files_and_missing_ones(tmp_path, store, monkeypatch) -> None:
    source = Folder(tmp_path, store, FRAMING)
    first, second = source.listing().items
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{store.partition('//')[2]}/cats/a.png", bytes(MAX_BYTES + 1))
    memory.rm_file(f"{store.partition('//')[2]}/dogs/b.png")
    with pytest.raises(BadData, match="E-IMG-002"):
        source.read(first)
    with pytest.raises(BadData, match="E-IMG-011"):
        source.read(second)
    (after,) = source.listing().items
    assert after.version != first.version
    monkeypatch.setattr(type(memory), "cat_file", lambda *args, **more: 1 / 0)
    monkeypatch.setattr(type(memory), "size", lambda *args: 1)
    with pytest.raises(StorageError, match="E-IO-060"):
        source.read(first)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file:///etc", "E-INP-060"),
        ("zip://*::memory://a.zip", "E-INP-060"),
        ("nosuchstore://x", "E-INP-061"),
        ("memory://not-there", "E-INP-06|E-INP-022"),
    ],
)
def test_a_url_that_is_no_store_is_one_line(tmp_path, url, code) -> None:
    with pytest.raises(InputMissing, match=code):
        Folder(tmp_path, url, FRAMING).listing()
