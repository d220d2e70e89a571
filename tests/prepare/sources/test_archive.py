"""Images in zip and tar archives, and what hostile archives get: one line each, nothing unpacked."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import stat
import struct
import tarfile
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.params import Data
from pipeline.errors import BadData, InputMissing, PipelineError
from pipeline.prepare.framing import Framing
from pipeline.prepare.limits import MAX_BYTES
from pipeline.prepare.sources import archive_trees
from pipeline.prepare.sources.archive import Archive
from pipeline.prepare.sources.folder import Folder
from pipeline.prepare.sources.load import data_of

FRAMING = Framing(16, "crop", (255, 255, 255))
KINDS = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz")


def png(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
FILES = {
    "train/10_red cat/a.png": png(1),
    "train/10_red cat/b.png": png(2),
    "train/10_red cat/b.txt": b"a cat, asleep",
    "test/dog/c.png": png(3),
    "metadata.jsonl": json.dumps({"file_name": "test/dog/c.png", "text": "a dog"}).encode(),
    "__MACOSX/train/._a.png": b"junk",
    "train/.DS_Store": b"junk",
    "train/Thumbs.db": b"junk",
}


def make_zip(members):
    """`members`: pairs of a name or ZipInfo and its bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(members, pax=True):
    """`members`: pairs of a name or TarInfo and its bytes."""
    buffer = io.BytesIO()
    kind = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for info, content in members:
            info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make(kind, members):
    if kind == "zip":
        return make_zip(members)
    press = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
    return press[kind](make_tar(members))


def open_bytes(folder, content):
    (folder / "images").write_bytes(content)
    return Archive(folder, "images", FRAMING)


# What works.


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_read_like_the_folder_it_was_packed_from(tmp_path, kind) -> None:
    for name, content in FILES.items():
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    source = open_bytes(tmp_path, make(kind, FILES.items()))
    packed, plain = source.listing(), Folder(tmp_path, "raw", FRAMING).listing()
    of_item = {item.id: (item.captions, item.group, item.subgroup, item.flaw) for item in plain.items}
    assert {
        item.id: (item.captions, item.group, item.subgroup, item.flaw) for item in packed.items
    } == of_item
    assert packed.notes == plain.notes == ()
    assert of_item["train/10_red cat/a.png"] == (("red cat",), "10_red cat", "10_red cat", None)
    assert of_item["test/dog/c.png"][0] == ("a dog",)
    for item in packed.items:
        assert source.read(item) == FILES[item.id]
        assert source.decode(source.read(item), item.where).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_read_in_any_order_and_after_pickling(tmp_path, kind) -> None:
    source = open_bytes(tmp_path, make(kind, [(f"{n}.png", png(n)) for n in range(5)]))
    items = source.listing().items
    source = pickle.loads(pickle.dumps(source))
    assert source.listing().items == items
    for number in (0, 1, 2, 4, 3, 0, 0):
        assert source.read(items[number]) == png(number)


def read_all(source, items, results) -> None:
    results.put([source.read(item) for item in items] * 3)


def test_processes_that_share_an_open_archive_do_not_disturb_each_other(tmp_path) -> None:
    source = open_bytes(tmp_path, make("tar.gz", [(f"{n}.png", png(n)) for n in range(20)]))
    items = source.listing().items
    assert source.read(items[0]) == png(0)
    context = get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=read_all, args=(source, items, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [source.read(item) for item in items] == [png(n) for n in range(20)]
    assert [results.get(), results.get()] == [[png(n) for n in range(20)] * 3] * 2
    for process in processes:
        process.join()


def test_a_version_changes_with_the_bytes_of_a_member(tmp_path) -> None:
    for kind in ("zip", "tar"):
        one = open_bytes(tmp_path, make(kind, [("a.png", png(1)), ("b.png", png(2))])).listing().items
        os.utime(tmp_path / "images", ns=(1, 1))
        two = open_bytes(tmp_path, make(kind, [("a.png", png(1)), ("b.png", png(3))])).listing().items
        assert one[1].version != two[1].version
        if kind == "zip":
            assert one[0].version == two[0].version


def test_the_first_bytes_tell_the_kind_of_an_archive(tmp_path) -> None:
    (tmp_path / "images.tar.gz").write_bytes(make_zip([("a.png", PNG)]))
    assert len(Archive(tmp_path, "images.tar.gz", FRAMING).listing().items) == 1


def test_names_in_an_archive_may_begin_with_a_dot_and_a_slash(tmp_path) -> None:
    source = open_bytes(tmp_path, make_tar([("./cats/a.png", PNG), (".//b.png", PNG)]))
    assert [item.id for item in source.listing().items] == ["cats/a.png", "b.png"]


def test_an_archive_in_an_archive_is_named(tmp_path) -> None:
    inner = make_zip([("a.png", PNG)])
    found = open_bytes(tmp_path, make_zip([("inner.zip", inner), ("b.png", PNG)])).listing()
    assert [item.id for item in found.items] == ["b.png"]
    assert "E-ARC-019 images: holds 1 archives, which are not opened: inner.zip" in str(found.notes[0])
    with pytest.raises(InputMissing, match="E-INP-022 images: holds no images, but 1 archives"):
        open_bytes(tmp_path, make_zip([("inner.zip", inner)])).listing()


PHONE = [("IMG_1.JPG", PNG), ("IMG_1.TXT", b"a dog"), ("IMG_2.Jpeg", png(2)), ("IMG_2.Txt", b"a cat")]
MAC = [("__MACOSX/._IMG_1.JPG", b"\0\5\26\7"), (".DS_Store", b"x"), ("._IMG_2.Jpeg", b"x")]
WINDOWS = [
    ("desktop.ini", b"[x]"),
    ("Thumbs.db", b"x"),
    ("clip.MP4", b"x"),
    ("notes.docx", b"PK"),
    ("IMG_1.AAE", b"x"),
]
SIDE = json.dumps({"caption": "a dog", "url": "x"}).encode()
PACKED = {  # members, captions by image, what is passed over
    "of a phone": (PHONE, ("a dog", "a cat"), {}),
    "of a Mac": (PHONE + MAC, ("a dog", "a cat"), {"__MACOSX": 1, "hidden": 2}),
    "of Windows": (
        PHONE + WINDOWS,
        ("a dog", "a cat"),
        {".aae": 1, ".docx": 1, ".mp4": 1, "Thumbs.db": 1, "desktop.ini": 1},
    ),
    "below a folder": (
        [(f"my photos/{name}", content) for name, content in PHONE + MAC],
        ("a dog", "a cat"),
        {"__MACOSX": 1, "hidden": 2},
    ),
    "names with dots": ([("./22.01.v1.png", PNG), ("./22.01.v1.txt", b"a dog")], ("a dog",), {}),
    "JSON beside images": ([("000.jpg", PNG), ("000.json", SIDE)], ("a dog",), {}),
    "text and JSON": ([("000.jpg", PNG), ("000.json", SIDE), ("000.txt", b"a red dog")], ("a red dog",), {}),
    "classes": ([("000.png", PNG), ("000.cls", b"3")], (None,), {".cls": 1}),
    "two suffixes": ([("0.input.jpg", PNG), ("0.outputs.txt", b"a dog")], (None,), {".txt": 1}),
}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("case", PACKED)
def test_archives_of_phones_and_shards_keep_every_caption_and_count_the_rest(tmp_path, case, kind) -> None:
    members, texts, passed_over = PACKED[case]
    found = open_bytes(tmp_path, make(kind, members)).listing()
    assert [item.captions for item in found.items] == [(text,) if text else () for text in texts]
    assert found.passed_over == passed_over and all(item.flaw is None for item in found.items)
    captions = len(members) - len(found.items) - sum(passed_over.values())
    assert captions >= sum(text is not None for text in texts)
    assert bool(found.notes) == (None in texts)  # what looks like captions and is not read is named


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_archives_is_one_source(tmp_path, kind) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        members = [
            (
                f"{shard:05}{n:04}.{suffix}",
                png(10 * shard + n) if suffix == "png" else f"thing {shard} {n}".encode(),
            )
            for n in range(3)
            for suffix in ("png", "txt")
        ]
        (shards / f"{shard:05}.{kind}").write_bytes(make(kind, [*members, (".hidden", b"x")]))
        (shards / f"{shard:05}_stats.json").write_text("{}")
        (shards / f"{shard:05}.parquet").write_bytes(b"x")
    source = pickle.loads(pickle.dumps(Archive(tmp_path, "shards", FRAMING)))
    found = source.listing()
    assert [item.captions for item in found.items] == [
        (f"thing {s} {n}",) for s in range(2) for n in range(3)
    ]
    assert {(item.group, item.flaw) for item in found.items} == {("", None)} and found.notes == ()
    assert found.passed_over == {".json": 2, ".parquet": 2, "hidden": 2}
    assert [source.read(item) for item in found.items] == [
        png(10 * s + n) for s in range(2) for n in range(3)
    ]
    data = data_of(Data.model_construct(source="folder", path="x", captions="auto"), "shards", tmp_path)
    assert (data.source, data.path) == ("archive", "shards")


def test_a_folder_without_archives_is_no_source_of_them(tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(InputMissing, match="E-INP-068 shards: holds no archives"):
        Archive(tmp_path, "shards", FRAMING).listing()


# Members that are refused, each with its own line, while the others are used.


def zip_link():
    info = zipfile.ZipInfo("x.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return make_zip([(info, "/etc/passwd"), ("ok.png", PNG)])


def zip_kind(kind):
    info = zipfile.ZipInfo("x.png")
    info.external_attr = (kind | 0o666) << 16
    return make_zip([(info, b""), ("ok.png", PNG)])


def directory_field(content, field, value):
    """A zip whose first member has another value in its directory: `field` is (offset, struct format)."""
    start = content.index(b"PK\x01\x02")
    offset, form = field
    changed = bytearray(content)
    struct.pack_into(form, changed, start + offset, value)
    return bytes(changed)


def zip_field(field, value, name="x.png", content=PNG):
    return directory_field(make_zip([(name, content), ("ok.png", PNG)]), field, value)


FLAGS, METHOD, CRC, UNPACKED = (8, "<H"), (10, "<H"), (16, "<I"), (24, "<I")


def zip_names(*names):
    return make_zip([*((name, PNG) for name in names), ("ok.png", PNG)])


def zip_raw_name(name, other):
    """A zip whose first member has the raw bytes `other` for its name, of the same length."""
    assert len(name) == len(other)
    return make_zip([(name.decode(), PNG), ("ok.png", PNG)]).replace(name, other)


def tar_info(kind, name="x.png", **more):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return make_tar([(info, b""), ("ok.png", PNG)])


def tar_names(*names):
    return make_tar([*((name, PNG) for name in names), ("ok.png", PNG)])


def tar_pax(**headers):
    info = tarfile.TarInfo("x.png")
    info.pax_headers = headers
    return make_tar([(info, PNG), ("ok.png", PNG)])


REFUSED = {
    "zip, up": (lambda: zip_names("../x.png"), "E-ARC-010"),
    "zip, up in the middle": (lambda: zip_names("a/../../x.png"), "E-ARC-010"),
    "zip, up by backslashes": (lambda: zip_names("..\\..\\x.png"), "E-ARC-010"),
    "zip, absolute": (lambda: zip_names("/etc/x.png"), "E-ARC-010"),
    "zip, a drive": (lambda: zip_names("C:\\x.png"), "E-ARC-010"),
    "zip, a share": (lambda: zip_names("\\\\host\\x.png"), "E-ARC-010"),
    "zip, NUL": (lambda: zip_raw_name(b"x#.png", b"x\0.png"), "E-ARC-011"),
    "zip, name of dots": (lambda: zip_names("./."), "E-ARC-011"),
    "zip, long name": (lambda: zip_names("x" * 60_000 + ".png"), "E-ARC-011"),
    "zip, link": (zip_link, "E-ARC-012"),
    "zip, device": (lambda: zip_kind(stat.S_IFBLK), "E-ARC-013"),
    "zip, FIFO": (lambda: zip_kind(stat.S_IFIFO), "E-ARC-013"),
    "zip, socket": (lambda: zip_kind(stat.S_IFSOCK), "E-ARC-013"),
    "zip, encrypted": (lambda: zip_field(FLAGS, 0x1), "E-ARC-014"),
    "zip, strongly encrypted": (lambda: zip_field(FLAGS, 0x41), "E-ARC-014"),
    "zip, name twice": (lambda: zip_names("x.png", "x.png"), "E-ARC-015"),
    "zip, name twice, written differently": (lambda: zip_names("a/x.png", "./a//x.png"), "E-ARC-015"),
    "zip, ratio bomb": (lambda: make_zip([("x.png", bytes(3 << 20)), ("ok.png", PNG)]), "E-ARC-016"),
    "zip, declared 4 GB": (lambda: zip_field(UNPACKED, 2**32 - 2), "E-ARC-016"),
    "zip, method": (lambda: zip_field(METHOD, 99), "E-ARC-018"),
    "tar, up": (lambda: tar_names("../x.png"), "E-ARC-010"),
    "tar, absolute": (lambda: tar_names("/etc/x.png"), "E-ARC-010"),
    "tar, up by a long name": (lambda: tar_names("a/" * 100 + "../" * 101 + "x.png"), "E-ARC-010"),
    "tar, up by pax": (lambda: tar_pax(path="../../x.png"), "E-ARC-010"),
    "tar, NUL by pax": (lambda: tar_pax(path="x\0.png"), "E-ARC-011"),
    "tar, long name": (lambda: tar_names("x" * 5000 + ".png"), "E-ARC-011"),
    "tar, no name": (lambda: tar_names(""), "E-ARC-011"),
    "tar, symlink": (lambda: tar_info(tarfile.SYMTYPE, linkname="/etc/passwd"), "E-ARC-012"),
    "tar, hardlink": (lambda: tar_info(tarfile.LNKTYPE, linkname="ok.png"), "E-ARC-012"),
    "tar, link to itself": (lambda: tar_info(tarfile.SYMTYPE, linkname="x.png"), "E-ARC-012"),
    "tar, character device": (lambda: tar_info(tarfile.CHRTYPE, devmajor=1, devminor=5), "E-ARC-013"),
    "tar, block device": (lambda: tar_info(tarfile.BLKTYPE, devmajor=8), "E-ARC-013"),
    "tar, FIFO": (lambda: tar_info(tarfile.FIFOTYPE), "E-ARC-013"),
    "tar, unknown type": (lambda: tar_info(b"Z"), "E-ARC-013"),
    "tar, name twice": (lambda: tar_names("x.png", "x.png"), "E-ARC-015"),
    "tar, sparse": (lambda: tar_pax(**{"GNU.sparse.map": "0,10", "GNU.sparse.size": "10"}), "E-ARC-018"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("content", "code"), REFUSED.values(), ids=REFUSED)
def test_a_hostile_member_is_refused_and_the_others_are_used(tmp_path, content, code) -> None:
    source = open_bytes(tmp_path, content())
    items = {item.id: item for item in source.listing().items}
    assert len(items) == len(source.listing().items)
    (flawed,) = [item for item in items.values() if item.flaw is not None]
    assert flawed.flaw.code == code
    assert str(flawed.flaw).isprintable() and " Fix: " in str(flawed.flaw) and len(str(flawed.flaw)) < 900
    with pytest.raises(BadData, match=code):
        source.read(flawed)
    assert source.read(items["ok.png"]) == PNG
    assert os.listdir(tmp_path) == ["images"]


def zip_longer_than_declared():
    """A member whose directory says 10 bytes with their CRC, and that unpacks to more."""
    content = make_zip([("x.png", PNG), ("ok.png", PNG)])
    return directory_field(content, UNPACKED, 10)


def zip_other_name_inside():
    content = make_zip([("x.png", PNG), ("ok.png", PNG)])
    return content.replace(b"x.png", b"y.png", 1)


def zip_damaged_inside():
    content = bytearray(make_zip([("x.png", PNG), ("ok.png", PNG)]))
    content[60:90] = bytes(30)
    return bytes(content)


def zip_elsewhere():
    return directory_field(make_zip([("x.png", PNG), ("ok.png", PNG)]), (42, "<I"), 2**31)


DAMAGED_MEMBERS = {
    "wrong CRC": lambda: zip_field(CRC, 1),
    "longer than declared": zip_longer_than_declared,
    "longer declared": lambda: zip_field(UNPACKED, len(PNG) + 1000),
    "other name inside": zip_other_name_inside,
    "damaged inside": zip_damaged_inside,
    "place outside the file": zip_elsewhere,
    "patched data": lambda: zip_field(FLAGS, 0x20),
}


@pytest.mark.parametrize("content", DAMAGED_MEMBERS.values(), ids=DAMAGED_MEMBERS)
def test_a_damaged_member_is_bad_data_when_it_is_read(tmp_path, content) -> None:
    source = open_bytes(tmp_path, content())
    items = {item.id: item for item in source.listing().items}
    with pytest.raises(BadData, match="E-ARC-017 images/x.png: is damaged or cut off") as caught:
        source.read(items["x.png"])
    assert str(caught.value).isprintable()
    assert source.read(items["ok.png"]) == PNG


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_over_the_limit_is_bad_data_when_it_is_read(tmp_path, kind) -> None:
    content = make(kind, [("x.png", np.random.default_rng(0).bytes(5000))])
    tree = archive_trees.open_archive(open_bytes(tmp_path, content)._tree._path, "images")
    with pytest.raises(BadData, match="E-IMG-002 images/x.png: has 5000 bytes, the limit is 4999"):
        tree.read("x.png", 4999)
    assert len(tree.read("x.png", 5000)) == 5000
    with pytest.raises(BadData, match="E-IMG-011"):
        tree.read("y.png", 5000)


def test_a_tar_that_declares_a_huge_member_costs_no_memory(tmp_path) -> None:
    """The hole at the end is a sparse file on the disk."""
    path = tmp_path / "images"
    info = tarfile.TarInfo("x.png")
    info.size = MAX_BYTES + 512
    path.write_bytes(info.tobuf())
    os.truncate(path, 512 + info.size + 1024)
    source = Archive(tmp_path, "images", FRAMING)
    with pytest.raises(BadData, match="E-IMG-002"):
        source.read(source.listing().items[0])


# Archives that are refused as a whole, in one line.


def tar_change(offset, value, pax=False):
    content = bytearray(make_tar([("a.png", PNG), ("b.png", PNG), ("c.png", PNG)], pax))
    content[offset : offset + len(value)] = value
    return bytes(content)


def second(offset):
    """An offset in the header of the second member."""
    return 512 + -(-len(PNG) // 512) * 512 + offset


def tar_headers(kind, size, count=1):
    """A tar of `count` special headers that each declare `size` bytes of names or attributes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) * count + bytes(10_240)


def negative_size():
    header = bytearray(tarfile.TarInfo("x.png").tobuf())
    header[124:136] = b"\xff" * 10 + (-1024 % 65536).to_bytes(2, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return make_tar([("a.png", PNG)])[: second(0)] + bytes(header) + bytes(10_240)


def gzip_bomb():
    """16 MiB of zeros in a member of a small compressed tar."""
    return gzip.compress(make_tar([("x.bmp", bytes(16 << 20))]))


ZIP = make_zip([(f"{n}.png", png(n)) for n in range(3)])
TAR = make_tar([(f"{n}.png", png(n)) for n in range(3)])
WHOLE = {
    "nothing": (lambda: b"", "E-ARC-003"),
    "text": (lambda: b"hello", "E-ARC-003"),
    "an image": (lambda: PNG, "E-ARC-003"),
    "zeros": (lambda: bytes(10_240), "E-ARC-003"),
    "rar": (lambda: b"Rar!\x1a\7\0" + bytes(100), "E-ARC-003"),
    "zip, cut in half": (lambda: ZIP[: len(ZIP) // 2], "E-ARC-001"),
    "zip, last byte gone": (lambda: ZIP[:-1], "E-ARC-001"),
    "zip, first half gone": (lambda: b"PK\x03\x04" + ZIP[len(ZIP) // 2 :], "E-ARC-001|E-ARC-017"),
    "zip, directory damaged": (lambda: ZIP.replace(b"PK\x01\x02", b"PK\x01\x03"), "E-ARC-001"),
    "zip, name is no UTF-8": (
        lambda: make_zip([("\u00e9.png", PNG)]).replace("\u00e9".encode(), b"\xff\xff"),
        "E-ARC-001",
    ),
    "tar, cut in a member": (lambda: TAR[: second(600)], "E-ARC-001"),
    "tar, cut in a header": (lambda: TAR[: second(100)], "E-ARC-001"),
    "tar, cut between members": (lambda: TAR[: second(0)], "E-ARC-001"),
    "tar, cut before its end mark": (lambda: TAR[: second(0) * 3], "E-ARC-001"),
    "tar, first header damaged": (lambda: tar_change(0, b"\xff\xff"), "E-ARC-001"),
    "tar, second header damaged": (lambda: tar_change(second(0), b"\xff\xff"), "E-ARC-001"),
    "tar, second checksum damaged": (lambda: tar_change(second(148), b"zzzz"), "E-ARC-001"),
    "tar, negative size": (negative_size, "E-ARC-001"),
    "tar, name of 8 GB": (lambda: tar_headers(tarfile.GNUTYPE_LONGNAME, 8**11 - 1), "E-ARC-001"),
    "tar, attributes of 1 GB": (lambda: b"" + tar_headers(tarfile.XHDTYPE, 2**30), "E-ARC-001"),
    "tar, names without end": (lambda: tar_headers(tarfile.GNUTYPE_LONGNAME, 0, 5000), "E-ARC-001"),
    "tar.gz, cut": (lambda: gzip.compress(TAR)[:-9], "E-ARC-001"),
    "tar.gz, wrong CRC": (lambda: gzip.compress(TAR)[:-8] + b"12345678", "E-ARC-001"),
    "tar.gz, no tar inside": (lambda: gzip.compress(b"hello"), "E-ARC-001"),
    "tar.gz, bomb": (gzip_bomb, "E-ARC-016"),
    "tar.gz, bomb of zeros after the end": (lambda: gzip.compress(TAR + bytes(16 << 20)), "E-ARC-016"),
    "tar.gz, bomb in a name": (
        lambda: gzip.compress(tar_headers(tarfile.GNUTYPE_LONGNAME, 16 << 20) + bytes(16 << 20)),
        "E-ARC-001",
    ),
    "tar.bz2, cut": (lambda: bz2.compress(TAR)[:-9], "E-ARC-001"),
    "tar.xz, cut": (lambda: lzma.compress(TAR)[:-9], "E-ARC-001"),
    "tar.xz, damaged": (lambda: lzma.compress(TAR)[:100] + bytes(500), "E-ARC-001"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "code"), WHOLE.values(), ids=WHOLE)
def test_a_damaged_archive_is_one_line(tmp_path, content, code) -> None:
    with pytest.raises(BadData, match=code) as caught:
        source = open_bytes(tmp_path, content())
        for item in source.listing().items:
            source.read(item)
    assert str(caught.value).isprintable() and "images" in str(caught.value)


def test_no_archive_and_one_without_images_are_input_missing(tmp_path) -> None:
    with pytest.raises(InputMissing, match="E-INP-063 images: is not a file"):
        Archive(tmp_path, "images", FRAMING)
    for content in (make_zip([]), make_zip([("notes.md", b"")]), make_tar([("notes.md", b"")])):
        with pytest.raises(InputMissing, match="E-INP-022 images: holds no images"):
            open_bytes(tmp_path, content).listing()


@pytest.mark.slow
def test_a_hundred_thousand_members_of_one_name_are_all_accounted_for(tmp_path) -> None:
    header = tarfile.TarInfo("x.png").tobuf()
    items = open_bytes(tmp_path, header * 100_000 + bytes(10_240)).listing().items
    assert len({item.id for item in items}) == 100_000
    assert [item.flaw is None for item in items] == [True] + [False] * 99_999


def test_a_zip_of_very_many_members_is_listed(tmp_path) -> None:
    """Its directory is made by repeating one entry under many names."""
    whole = make_zip([("00000.png", PNG)])
    start, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    entries = b"".join(whole[start:end].replace(b"00000", b"%05d" % n) for n in range(65_000))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65_000, 65_000, len(entries), start, 0)
    items = open_bytes(tmp_path, whole[:start] + entries + tail).listing().items
    assert len(items) == 65_000 and all(item.flaw is None for item in items)


def test_there_may_be_so_many_members_and_no_more(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.archive_trees.MAX_MEMBERS", 3)
    for kind in KINDS:
        assert (
            len(open_bytes(tmp_path, make(kind, [(f"{n}.png", b"") for n in range(3)])).listing().items) == 3
        )
        content = make(kind, [(f"{n}.png", b"") for n in range(4)])
        with pytest.raises(BadData, match="E-ARC-002 images: has more than 3 members"):
            open_bytes(tmp_path, content).listing()


ODD_NAMES = (
    "a\nb.png",
    "\u202egnp.a.png",
    "-rf.png",
    "x" * 251 + ".png",
    "cafe\u0301.png",
    "caf\u00e9.png",
    "a\\.png",
)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_odd_names_are_shown_on_one_line_and_read(tmp_path, kind) -> None:
    source = open_bytes(tmp_path, make(kind, [(name, png(n)) for n, name in enumerate(ODD_NAMES)]))
    items = source.listing().items
    assert len(items) == len(ODD_NAMES) and all(item.id.isprintable() for item in items)
    assert [source.read(item) for item in items] == [png(n) for n in range(len(ODD_NAMES))]


def test_names_in_a_tar_that_are_not_utf8_are_escaped_and_read(tmp_path) -> None:
    content = make_tar([(os.fsdecode(b"\xff.png"), PNG)], pax=False)
    source = open_bytes(tmp_path, content)
    (item,) = source.listing().items
    assert item.id == r"\xff.png" and source.read(item) == PNG


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([ZIP, TAR, gzip.compress(TAR)]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_damage_anywhere_ends_in_an_error_for_users_or_in_bytes(tmp_path_factory, content, damage) -> None:
    changed = bytearray(content)
    for place, patch in damage:
        start = int(place * (len(content) - 1))
        changed[start : start + len(patch)] = patch
    folder = tmp_path_factory.getbasetemp()
    try:
        source = open_bytes(folder, bytes(changed))
        items = source.listing().items
    except PipelineError as problem:
        assert str(problem).isprintable()
        return
    for item in items:
        try:
            assert len(source.read(item)) <= MAX_BYTES
        except BadData as problem:
            assert str(problem).isprintable()
