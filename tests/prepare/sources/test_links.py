"""Links in a folder: followed where they may lead, else counted, named, and never lost in silence."""

import os

import numpy as np
import pytest
from PIL import Image

from pipeline.config.params import parse_params
from pipeline.errors import BadData
from pipeline.prepare import gates
from pipeline.prepare import prepare as stage
from pipeline.prepare.framing import Framing
from pipeline.prepare.ingest import IngestedItem
from pipeline.prepare.intake import Inspection, SortedItems
from pipeline.prepare.sources.folder import Folder
from pipeline.prepare.sources.source import Listing

FRAMING = Framing(16, "crop", (255, 255, 255))


@pytest.fixture()
def root(tmp_path):
    """A store with two classes of eight pictures and captions, and an empty raw folder."""
    for kind in ("cat", "dog"):
        (tmp_path / "store" / kind).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "store" / kind / f"{number}.png").write_bytes(b"image")
            (tmp_path / "store" / kind / f"{number}.txt").write_text(f"{kind} {number}")
    (tmp_path / "raw").mkdir()
    return tmp_path


def folder_links(root) -> int:
    for kind in ("cat", "dog"):
        (root / "raw" / kind).symlink_to(f"../store/{kind}")
    return 16


def file_links(root) -> int:
    for kind in ("cat", "dog"):
        (root / "raw" / kind).mkdir()
        for number in range(8):
            (root / "raw" / kind / f"{number}.png").symlink_to(root / "store" / kind / f"{number}.png")
    return 16


def links_to_links(root) -> int:
    (root / "other").symlink_to("store")
    (root / "raw/cat").symlink_to("../other/cat")
    return 8


def one_link_among_files(root) -> int:
    (root / "raw/mine").mkdir()
    for number in range(40):
        (root / "raw/mine" / f"{number}.png").write_bytes(b"image")
    (root / "raw/dog").symlink_to("../store/dog")
    return 48


LAYOUTS = [folder_links, file_links, links_to_links, one_link_among_files]


def listing(root, *roots):
    return Folder(root, "raw", FRAMING, roots=roots).listing()


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("absolute", [False, True])
def test_links_below_a_named_folder_are_followed(root, make, absolute) -> None:
    count = make(root)
    found = listing(root, str(root / "store") if absolute else "store")
    assert len(found.items) == count and not any(item.flaw for item in found.items)
    source = Folder(root, "raw", FRAMING, roots=("store",))
    assert all(source.read(item) == b"image" for item in found.items)
    if make is folder_links:
        assert {item.captions for item in found.items} == {
            (f"{k} {n}",) for k in ("cat", "dog") for n in range(8)
        }


@pytest.mark.parametrize("make", LAYOUTS)
def test_links_outside_stop_the_stage_and_are_named_with_their_cure(root, make) -> None:
    make(root)
    items = listing(root).items
    quarantined = [IngestedItem(item, root, -1, None, item.flaw) for item in items if item.flaw]
    ok = [IngestedItem(item, root, 0, None, None) for item in items if not item.flaw]
    inspection = Inspection.__new__(Inspection)
    object.__setattr__(inspection, "items", SortedItems(ok=ok, quarantined=quarantined))
    object.__setattr__(inspection, "listing", Listing(items))
    data = parse_params_data(root)
    with pytest.raises(BadData, match="E-DAT-004") as caught:
        gates.require_items(inspection, data, "report.jsonl")
    line = str(caught.value)
    assert caught.value.exit_status == 65 and f"{root}/store" in line and "data.link_roots: [" in line
    if make is not file_links:
        assert "a link to a folder of 16 files" in line
    for flaw in quarantined:
        with pytest.raises(BadData, match="E-IMG-014"):
            Folder(root, "raw", FRAMING).read(flaw.item)


def parse_params_data(root):
    from pipeline.config.params import load_params

    return load_params(os.path.join(os.path.dirname(__file__), "../../../params.yaml")).data


@pytest.mark.parametrize("config", ["", "[cache]\n    type = symlink\n", "[cache]\n    dir = ../elsewhere\n"])
def test_links_to_the_cache_of_dvc_are_followed(root, config) -> None:
    cache = root / ("elsewhere" if "dir" in config else ".dvc/cache") / "files/md5/ab"
    cache.mkdir(parents=True)
    (root / ".dvc").mkdir(exist_ok=True)
    (root / ".dvc/config").write_text(config)
    (cache / "cdef").write_bytes(b"image")
    (root / "raw/a.png").symlink_to(cache / "cdef")
    (item,) = listing(root).items
    assert item.flaw is None and Folder(root, "raw", FRAMING).read(item) == b"image"


def test_links_inside_of_the_folder_are_followed_but_not_in_circles(root) -> None:
    (root / "raw/cat").mkdir()
    (root / "raw/cat/a.png").write_bytes(b"image")
    (root / "raw/cat/again").symlink_to("..")
    (root / "raw/self").symlink_to(".")
    (root / "raw/same.png").symlink_to("cat/a.png")
    found = listing(root)
    assert [(item.id, item.flaw) for item in found.items] == [("cat/a.png", None), ("same.png", None)]
    assert found.passed_over == {"links to a folder above": 2}


def test_a_folder_that_is_a_link_itself_is_read(root) -> None:
    (root / "raw").rmdir()
    (root / "raw").symlink_to("store")
    assert len(listing(root).items) == 16 and not any(item.flaw for item in listing(root).items)


@pytest.mark.parametrize("target", ["nothing.png", "/nothing/at/all", "raw.png"])
def test_a_link_to_nothing_is_named_with_its_target(root, target) -> None:
    (root / "raw/a.png").symlink_to(target)
    (item,) = listing(root).items
    assert str(item.flaw).startswith(f"E-IMG-007 raw/a.png: is a link to {target}, which is not there")


def test_a_link_that_is_turned_outside_after_listing_is_not_read(root) -> None:
    (root / "raw/a.png").symlink_to(root / "raw/b.png")
    (root / "raw/b.png").write_bytes(b"image")
    source = Folder(root, "raw", FRAMING)
    item = source.listing().items[0]
    (root / "raw/a.png").unlink()
    (root / "raw/a.png").symlink_to("/etc/hostname")
    with pytest.raises(BadData, match="E-IMG-014"):
        source.read(item)


OTHERS = [
    "notes.docx",
    "clip.mp4",
    "desktop.ini",
    "a.pdf",
    "Thumbs.db",
    "x.PY",
    ".DS_Store",
    "index.html",
    "s.MOV",
]


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_no_pictures_are_counted_by_kind(root, name) -> None:
    (root / "raw/a.png").write_bytes(b"image")
    (root / "raw" / name).write_bytes(b"something")
    found = listing(root)
    assert [item.id for item in found.items] == ["a.png"] and sum(found.passed_over.values()) == 1


def test_every_file_is_an_image_a_caption_or_counted(root) -> None:
    for number, name in enumerate(
        (*OTHERS, "a.png", "a.txt", "metadata.csv", "b.jpg", "c", "b.xyz", "README.md")
    ):
        (root / "raw" / name).write_bytes(b"file_name,text\na.png,x\n" if "csv" in name else b"%d" % number)
    found = listing(root)
    assert [item.id for item in found.items] == ["a.png", "b.jpg", "b.xyz", "c"]
    assert len(os.listdir(root / "raw")) == len(found.items) + 2 + sum(found.passed_over.values())


def test_the_stage_follows_and_refuses_links(tmp_path, tiny_tree) -> None:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        path = tmp_path / ("store" if number == 0 else "raw") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "raw/0.png").symlink_to("../store/0.png")
    tree = {**tiny_tree["data"], "source": "folder", "path": "raw", "subset": [], "text_encoder": "label"}
    tree |= {"max_bad_fraction": 0.5}
    with pytest.raises(BadData, match="E-DAT-004 .*store/0.png"):
        stage.check(parse_params({**tiny_tree, "data": tree}), tmp_path, None, print)
    assert "E-IMG-014" in (tmp_path / stage.CHECKED).read_text()
    lines: list[str] = []
    stage.check(
        parse_params({**tiny_tree, "data": {**tree, "link_roots": ["store"]}}), tmp_path, None, lines.append
    )
    assert lines[0] == "folder: 12 images, 12 usable, 0 to quarantine, 0 duplicates"
