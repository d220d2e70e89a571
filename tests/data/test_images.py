"""Decoding: what users' files hold, and what hostile ones do."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import box_mean, decode, scale_to_bytes, square, tile
from pipeline.errors import BadData

WHITE = (255, 255, 255)


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(mode="RGB", size=(24, 20)):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def code_of(content):
    with pytest.raises(BadData) as caught:
        decode(content, "raw/a.png", WHITE)
    assert str(caught.value).startswith(f"{caught.value.code} raw/a.png: ")
    assert len(str(caught.value).splitlines()) == 1
    return caught.value.code


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    image = noise()
    content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(content, "a", WHITE), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_other_formats_come_back_as_rgb(kind):
    assert decode(encoded(noise(), kind), "a", WHITE).shape == (20, 24, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "I;16"])
def test_every_mode_becomes_rgb_bytes(mode):
    content = encoded(
        noise().convert(mode) if mode != "I;16" else noise("L").convert("I").convert("I;16"), "TIFF"
    )
    pixels = decode(content, "a", WHITE)
    assert pixels.shape == (20, 24, 3) and pixels.dtype == np.uint8


def test_transparent_pixels_show_the_background_and_not_their_hidden_colour():
    content = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))
    assert (decode(content, "a", (10, 20, 30)) == (10, 20, 30)).all()
    half = decode(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128))), "a", WHITE)
    assert abs(int(half[0, 0, 0]) - 127) <= 1


def test_a_transparent_palette_entry_shows_the_background():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert (decode(encoded(image, transparency=0), "a", WHITE) == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    image = Image.fromarray(np.full((16, 16), 40000, np.uint16))
    assert (decode(encoded(image), "a", WHITE) == round(40000 / 257)).all()


def test_scaling_knows_integers_from_floats():
    assert scale_to_bytes(np.array([0, 65535], np.uint16)).tolist() == [0, 255]
    assert scale_to_bytes(np.array([0, 200], np.int32)).tolist() == [0, 200]
    assert scale_to_bytes(np.array([0.0, 1.0])).tolist() == [0, 255]
    with pytest.raises(ValueError):
        scale_to_bytes(np.array([0.0, np.nan]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = np.asarray(noise()).copy()
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels), 7: np.rot90(pixels[::-1]), 8: np.rot90(pixels, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(decode(content, "a", WHITE), pixels)


def test_a_colour_profile_is_converted_and_a_broken_one_ignored():
    assert np.array_equal(decode(encoded(noise(), icc_profile=b"garbage"), "a", WHITE), np.asarray(noise()))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(content, "a", WHITE) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_file_cut_short_is_refused(kind, share):
    content = encoded(noise(size=(64, 64)), kind)
    assert code_of(content[: int(len(content) * share)]) in {"E-IMG-003", "E-IMG-005"}


def test_a_flipped_bit_never_escapes_as_another_exception():
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        content = encoded(noise(size=(32, 32)), kind)
        for _ in range(40):
            mutant = bytearray(content)
            mutant[draw.integers(len(mutant))] ^= 1 << draw.integers(8)
            try:
                assert decode(bytes(mutant), "a", WHITE).dtype == np.uint8
            except BadData as exc:
                assert len(str(exc).splitlines()) == 1


def test_files_that_are_no_images_are_refused():
    assert code_of(b"") == "E-IMG-001"
    assert code_of(b"hello") == "E-IMG-003"
    assert code_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "E-IMG-003"
    assert code_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "E-IMG-003"


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(9000, 9000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_too_large_to_decode_is_refused_before_it_is_decoded(size):
    assert code_of(png_header(*size)) in {"E-IMG-004", "E-IMG-005"}


def test_a_picture_too_small_to_use_is_refused():
    assert code_of(encoded(Image.new("RGB", (1, 500)))) == "E-IMG-006"


def test_square_takes_the_centre():
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = 200
    assert (square(pixels, 8) == 200).all()
    assert square(pixels, 4).shape == (4, 4, 3)
    assert square(pixels, 32).shape == (32, 32, 3)


def test_shrinking_is_antialiased():
    board = np.indices((64, 64)).sum(0)[..., None] % 2 * np.full(3, 255)
    small = square(board.astype(np.uint8), 16).astype(int)
    assert abs(small - 127).max() <= 2


def test_box_mean_is_the_mean_of_each_box():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(box_mean(pixels, 2)[0, 0], np.rint(pixels[:2, :2].mean((0, 1))))
    assert (box_mean(np.full((8, 8, 3), 7, np.uint8), 4) == 7).all()


def test_tiles_lie_in_rows():
    sheet = tile([np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 3)], columns=2, gap=1)
    assert sheet.shape == (11, 11, 3)
    assert [sheet[2, 2, 0], sheet[2, 7, 0], sheet[7, 2, 0]] == [1, 2, 3]
