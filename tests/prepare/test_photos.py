"""Photographs of phones and cameras: HEIC and JPEG XL as any other picture, raw files named, limits that follow."""

import io
import re
import sys
import warnings

import numpy as np
import pytest
from hostile import P3, PLUGINS, encode, profile, tiff
from PIL import Image

from pipeline.config.params import parse_params
from pipeline.errors import BadData, InputMissing
from pipeline.prepare import gates, photos
from pipeline.prepare import prepare as stage
from pipeline.prepare.framing import Framing
from pipeline.prepare.images import decode_square
from pipeline.prepare.ingest import IngestedItem
from pipeline.prepare.intake import Inspection, SortedItems
from pipeline.prepare.limits import Limits
from pipeline.prepare.sources.folder import Folder

FRAMING = Framing(32, "crop", (255, 255, 255))
MUTED = (100, 200, 100)
# An animation of three frames, red, green and blue, 16 px, made with libjxl; no plug-in writes one.
ANIMATED = bytes.fromhex(
    "ff0a43044d002026080401003c004b188b15805df4ff0022851400a73f080401003c004b188b15805df4ff008ea89b01a73f080405003c004b188b15805df4ff00a2a89b01a73f"
)


def test_the_plugins_are_there() -> None:
    """They are part of the environment of the tests, which would pass over them otherwise."""
    assert all(photos.plugin(kind) for kind in PLUGINS)


def decoded(content, name="raw/a", framing=FRAMING):
    return decode_square(content, name, framing)


def refusal(content, framing=FRAMING):
    with pytest.raises(BadData) as caught:
        decoded(content, framing=framing)
    return str(caught.value)


def quarters(size=(48, 32)):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    half = size[1] // 2, size[0] // 2
    pixels[: half[0], : half[1]], pixels[: half[0], half[1] :], pixels[half[0] :, : half[1]] = (
        (250, 0, 0), (0, 250, 0), (0, 0, 250),
    )  # fmt: skip
    return Image.fromarray(pixels)


def corners(picture):
    return picture.pixels[[3, 3, -4, -4], [3, -4, 3, -4]].astype(int)


# --- HEIC.


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_is_turned_upright_once(orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decoded(encode(quarters(), "HEIF", exif=exif.tobytes()))
    jpeg = decoded(encode(quarters(), "JPEG", exif=exif, subsampling=0))
    assert picture[1:3] == jpeg[1:3] == ((48, 32) if orientation in {1, 3} else (32, 48))
    assert abs(corners(picture) - corners(jpeg)).max() <= 12


def test_heic_in_display_p3_becomes_srgb() -> None:
    content = encode(Image.new("RGB", (64, 64), MUTED), "HEIF", icc_profile=profile(P3, 2.2), quality=95)
    jpeg = encode(Image.new("RGB", (64, 64), MUTED), "JPEG", icc_profile=profile(P3, 2.2), quality=95)
    assert (decoded(content).pixels[..., 0] < 85).all()
    assert abs(decoded(content).pixels.astype(int) - decoded(jpeg).pixels).max() <= 4


def test_of_several_images_the_primary_one_is_taken_and_counted() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime")]
    content = encode(frames[0], "HEIF", save_all=True, append_images=frames[1:])
    picture = decoded(content)
    assert picture.several and abs(picture.pixels.astype(int) - (255, 0, 0)).max() <= 6
    assert not decoded(encode(frames[0], "HEIF")).several


def test_high_dynamic_range_is_refused() -> None:
    content = encode(quarters(), "HEIF", color_primaries=9, transfer_characteristics=16)
    assert refusal(content).startswith("E-IMG-017 raw/a: is a picture of high dynamic range")


# --- JPEG XL.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("boxed", [False, True])
def test_jpeg_xl_without_loss_comes_back_exactly(mode, boxed) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    image = image.convert(mode)
    picture = decoded(encode(image, "JXL", lossless=True, use_container=boxed))
    assert (picture.mode, picture.several) == (mode, False)
    assert np.array_equal(picture.pixels, decoded(encode(image)).pixels)


def test_a_jpeg_inside_of_jpeg_xl_is_that_jpeg(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    settings = {"exif": exif, "icc_profile": profile(P3, 2.2), "subsampling": 0}
    (tmp_path / "a.jpg").write_bytes(encode(quarters(), "JPEG", **settings))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), Image.open(tmp_path / "a.jpg") as image:
        warnings.simplefilter("ignore")
        image.save(buffer, "JXL")
    assert photos.kind_of(buffer.getvalue()) == "JPEG XL"
    picture, jpeg = decoded(buffer.getvalue()), decoded((tmp_path / "a.jpg").read_bytes())
    assert picture[1:] == jpeg[1:] and np.array_equal(picture.pixels, jpeg.pixels)


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (300, 200), (4000, 3000), (1920, 1080), (40, 70_000)])
def test_the_size_of_jpeg_xl_is_read_from_its_header(size) -> None:
    content = encode(Image.new("L", size), "JXL", effort=1)
    assert photos.read_jxl_header(content) == (*size, False)
    assert refusal(content, FRAMING._replace(limits=Limits(max_pixels=63))).startswith("E-IMG-004")


def test_an_animated_jpeg_xl_is_refused() -> None:
    assert photos.read_jxl_header(ANIMATED) == (16, 16, True)
    assert refusal(ANIMATED).startswith("E-IMG-018 raw/a: is an animated JPEG XL")


# --- Raw files.


def test_raw_files_are_named_and_those_beside_their_picture_passed_over(tmp_path) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("a.NEF", "b.dng", "c.cr2", "c.JPG", "d.jpg"):
        (tmp_path / "raw" / name).write_bytes(b"x")
    found = Folder(tmp_path, "raw", FRAMING).listing()
    flaws = {item.id: item.flaw and item.flaw.code for item in found.items}
    assert flaws == {"a.NEF": "E-IMG-016", "b.dng": "E-IMG-016", "c.JPG": None, "d.jpg": None}
    assert found.passed_over == {".cr2 beside its picture": 1}
    line = photos.raw_in_words(["a.NEF", "b.nef", "c.dng"])
    assert line.startswith("3 raw camera files are not used (2 .nef, 1 .dng); develop and export")


@pytest.mark.parametrize("tags", [((50706, 1, 4, 0x401),), ((254, 4, 1, 1), (330, 4, 1, 8))])
def test_the_thumbnail_of_a_raw_file_is_not_taken_for_its_picture(tags) -> None:
    plain = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    content = tiff(*((tag, 4, 1, value) for tag, value in plain.items()), *tags, data=bytes(256))
    assert refusal(content).startswith("E-IMG-016 raw/a: is a raw camera file")


# --- The stage.


def photographs(root):
    """Twenty of phones, below raw."""
    (root / "raw").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(100 + number).integers(0, 256, (20, 24, 3), np.uint8)
        name, kind = ("heic", "HEIF") if number % 2 else ("jxl", "JXL")
        (root / "raw" / f"{number:02d}.{name}").write_bytes(encode(Image.fromarray(pixels), kind))


def test_without_the_plugins_the_extra_is_named(tmp_path, tiny_tree, monkeypatch) -> None:
    """Even if few files need it: what is used must not depend on the machine."""
    photographs(tmp_path)
    for module in photos.PLUGINS.values():
        monkeypatch.setitem(sys.modules, module, None)
    source = Folder(tmp_path, "raw", FRAMING)
    lacking = []
    for item in source.listing().items:
        with pytest.raises(
            BadData, match=r"E-IMG-015 raw/\d\d.* needs the extra photos\. Fix: pip install"
        ) as caught:
            source.decode(source.read(item), item.where)
        lacking.append(IngestedItem(item, tmp_path, -1, None, caught.value, passing=True))
    inspection = Inspection.__new__(Inspection)
    sound = IngestedItem(item, tmp_path, 0, None, None)
    object.__setattr__(inspection, "items", SortedItems(ok=[sound] * 10_000, quarantined=lacking))
    object.__setattr__(inspection, "listing", source.listing())
    with pytest.raises(InputMissing) as gate:
        gates.require_items(inspection, parse_params(tiny_tree).data, "report.jsonl")
    line = str(gate.value)
    assert "20 images need the extra photos (10 .jxl, 10 .heic), such as raw/00.jxl" in line
    assert "Fix: pip install 'crescendo[photos]', or export them as JPEG" in line


def test_phones_photographs_are_used_and_what_is_odd_is_named(tmp_path, tiny_tree) -> None:
    photographs(tmp_path)
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 4096, (20, 24), np.uint16)
        Image.fromarray(values).save(tmp_path / f"raw/12_bits_{number}.tif")
    frames = [Image.new("RGB", (20, 24), colour) for colour in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "raw/several.gif").write_bytes(content)
    (tmp_path / "raw/a.nef").write_bytes(b"raw")
    tree = {**tiny_tree["data"], "source": "folder", "path": "raw", "subset": [], "text_encoder": "label"}
    lines: list[str] = []
    stage.check(parse_params({**tiny_tree, "data": tree}), tmp_path, None, lines.append)
    text = "\n".join(lines)
    assert "folder: 24 images, 23 usable, 1 to quarantine" in text
    assert "warning: 1 raw camera file is not used (1 .nef); develop and export" in text
    assert "warning: 2 images have no value above 64 of 255, as where 10, 12 or 14 bits lie in 16" in text
    assert re.search(r"raw/12_bits_0.tif \(1[56]\), raw/12_bits_1.tif \(1[56]\)", text)
    assert "note: 1 file holds several images, of which the first is taken: raw/several.gif" in text


def test_limits_of_decoders_follow_those_of_files() -> None:
    usual, large = Limits(), Limits(max_bytes=2**28, max_pixels=200 * 10**6)
    assert (usual.megabytes, usual.seconds) == (1592, 16.0)
    assert (large.megabytes, large.seconds) == (5089, 50.0)
    assert (Limits(2**20, 10**6).megabytes, Limits(2**20, 10**6).seconds) == (512, 2.0)


def test_what_is_wrong_with_a_damaged_file_is_said_the_same_way_every_time() -> None:
    heic, jxl = (encode(quarters(), kind) for kind in PLUGINS.values())
    assert "is damaged (its header cannot be read)" in refusal(heic[:40] + bytes(200))
    assert "is damaged (it cannot be decoded)" in refusal(jxl[:40] + bytes(200))
    assert "is damaged (its header is cut off)" in refusal(jxl[:3])
