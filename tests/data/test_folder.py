"""A user's own folder: captions, groups, and files that do not belong."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources.folder import Folder, read_metadata
from pipeline.errors import BadData, InputMissing


def picture(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def listing(root):
    return Folder(root, "raw", 16, (255, 255, 255)).listing()


def captions(root):
    return {item.id: item.captions for item in listing(root).items}


def test_a_missing_or_empty_folder_is_input_missing(tmp_path):
    with pytest.raises(InputMissing, match="raw: is no folder"):
        listing(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "README.md").write_text("put images here")
    with pytest.raises(InputMissing, match="raw: holds no images"):
        listing(tmp_path)


def test_captions_come_from_metadata_then_text_files_then_folder_names(tmp_path):
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


def test_the_nearest_metadata_counts_and_names_that_are_not_there_are_noted(tmp_path):
    picture(tmp_path / "raw" / "cats" / "b.png")
    (tmp_path / "raw" / "metadata.jsonl").write_text('{"file_name": "cats/b.png", "text": "far"}')
    near = '{"file_name": "b.png", "text": "near"}\n{"file_name": "../../secret", "text": "x"}'
    (tmp_path / "raw" / "cats" / "metadata.jsonl").write_text(near)
    found = listing(tmp_path)
    assert found.items[0].captions == ("near",)
    assert [note.code for note in found.notes] == ["E-CAP-005"]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": "x"}', '{"file_name": "a", "text": 3}', "\xff", "[" * 9999]
)
def test_a_bad_line_of_metadata_is_named(line):
    content = b'{"file_name": "a.png", "text": "ok"}\n' + line.encode("latin-1")
    with pytest.raises(BadData, match="E-CAP-004 raw/metadata.jsonl line 2: "):
        read_metadata(content, "raw/metadata.jsonl")


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\xff\xfea", "E-CAP-002"), (b"x" * 70_000, "E-CAP-003"), (b"x" * 2000, "E-CAP-003")],
)
def test_an_unusable_text_file_flaws_its_image(tmp_path, content, code):
    picture(tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / "a.txt").write_bytes(content)
    (item,) = listing(tmp_path).items
    assert item.flaw.code == code


def test_sub_folders_are_groups(tmp_path):
    picture(tmp_path / "raw" / "animals" / "cats" / "a.png")
    (item,) = listing(tmp_path).items
    assert (item.group, item.subgroup, item.base) == ("animals", "animals/cats", None)


def test_hidden_files_and_documents_are_passed_over_and_links_not_followed(tmp_path):
    raw = tmp_path / "raw"
    picture(raw / "a.png")
    picture(raw / ".hidden" / "b.png")
    (raw / ".DS_Store").write_bytes(b"x")
    (raw / "notes.md").write_text("x")
    picture(tmp_path / "outside" / "c.png")
    (raw / "linked").symlink_to(tmp_path / "outside")
    (raw / "passwd.png").symlink_to("/etc/passwd")
    os.mkfifo(raw / "pipe.png")
    source = Folder(tmp_path, "raw", 16, (255, 255, 255))
    items = {item.id: item for item in source.listing().items}
    assert set(items) == {"a.png", "linked", "passwd.png", "pipe.png"}
    assert source.load(items["a.png"]).shape == (16, 16, 3)
    for name in ("linked", "passwd.png", "pipe.png"):
        with pytest.raises(BadData, match="E-IMG-007"):
            source.load(items[name])


def test_odd_file_names_become_plain_ids(tmp_path):
    raw = tmp_path / "raw"
    picture(raw / "a\nb.png")
    picture(raw / os.fsdecode(b"\xff.png"))
    picture(raw / "-rf.png")
    ids = sorted(item.id for item in listing(tmp_path).items)
    assert ids == ["-rf.png", r"\xff.png", r"a\nb.png"]
