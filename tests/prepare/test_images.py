"""Framing: what users' files hold, both ways through, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.errors import BadData
from pipeline.prepare import fast_decode, images
from pipeline.prepare.framing import Framing, box_mean, tile
from pipeline.prepare.images import decode_square
from pipeline.prepare.limits import Limits
from pipeline.prepare.pillow import scale_to_bytes

WHITE = (255, 255, 255)
SIDE = 24


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    if kind == "WEBP" and "quality" not in settings:
        settings["lossless"] = True
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(mode="RGB", size=(SIDE, SIDE)):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def photo(width, height, seed=0):
    """Noise with the spectrum of a photograph."""
    draw = np.random.default_rng(seed).standard_normal((height, width, 3))
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))[..., None]
    frequency[0, 0] = 1
    waves = np.fft.irfft2(np.fft.rfft2(draw, axes=(0, 1)) / frequency**1.2, s=(height, width), axes=(0, 1))
    waves = (waves - waves.mean()) / waves.std()
    return Image.fromarray(np.clip(128 + 50 * waves, 0, 255).astype(np.uint8))


def framed(content, resolution=SIDE, fit="crop", background=WHITE):
    return decode_square(content, "raw/a.png", Framing(resolution, fit, background))


def pixels_of(content, **how):
    return framed(content, **how).pixels


def by_pillow(content, resolution):
    """The plain recipe: decode, convert, take the centred square, resample."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC))


def psnr(one, other):
    mse = np.mean((one.astype(float) - other) ** 2)
    return 10 * np.log10(255**2 / max(mse, 1e-12))


def refused(content):
    with pytest.raises(BadData) as caught:
        framed(content)
    assert str(caught.value).startswith(f"{caught.value.code} raw/a.png: ")
    assert " Fix: " in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return caught.value.code


@pytest.fixture
def ways(monkeypatch):
    """Counts the files that go the quick way."""
    calls = []
    quick = fast_decode.decode_fast

    def counting(content, image, framing):
        calls.append(image.format)
        return quick(content, image, framing)

    monkeypatch.setattr(images, "decode_fast", counting)
    return calls


# --- Two ways, one answer.


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True, "subsampling": 0}),
        ("WEBP", {"quality": 90}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quick_way_agrees_with_pillow_within_80_db(kind, settings, mode, ways) -> None:
    files = [encoded(photo(256, 256, seed).convert(mode), kind, **settings) for seed in range(4)]
    quick = np.stack([pixels_of(content, resolution=64) for content in files])
    assert ways == [kind] * 4
    assert psnr(quick, np.stack([by_pillow(content, 64) for content in files])) >= 80


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (64, 64), (40, 61), (777, 500)])
@pytest.mark.parametrize(("resolution", "off"), [(32, 1), (64, 2), (128, 2)])
def test_at_any_scale_the_two_ways_differ_by_rounding_only(size, resolution, off, monkeypatch) -> None:
    content = encoded(photo(*size), "WEBP", lossless=True)
    quick = {fit: pixels_of(content, resolution=resolution, fit=fit).astype(int) for fit in ("crop", "pad")}
    monkeypatch.setattr(images, "is_plain", lambda content, image: False)
    for fit, pixels in quick.items():
        other = pixels_of(content, resolution=resolution, fit=fit)
        assert abs(pixels - other).max() <= off and psnr(pixels, other) >= 65


def test_each_way_is_deterministic(monkeypatch) -> None:
    content = encoded(photo(120, 90), "JPEG")
    for _ in range(2):
        assert np.array_equal(pixels_of(content), pixels_of(content))
        monkeypatch.setattr(images, "is_plain", lambda content, image: False)


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def profile(name):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def test_odd_files_go_the_thorough_way_and_plain_ones_the_quick_way(ways) -> None:
    plain = [
        encoded(noise(), "JPEG", exif=oriented(1)),
        encoded(noise(), "WEBP", icc_profile=profile("sRGB")),
        encoded(noise("L"), "WEBP"),
        encoded(noise()),
    ]
    odd = [
        encoded(noise().quantize(16)),
        encoded(noise(), "JPEG", exif=oriented(3)),
        encoded(noise(), "WEBP", exif=oriented(3)),
        encoded(noise(), "JPEG", icc_profile=profile("XYZ")),
        encoded(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "WEBP"),
        encoded(noise().convert("CMYK"), "JPEG"),
        encoded(noise(), "WEBP", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
        encoded(noise(), "TIFF"),
    ]
    for content in plain + odd:
        framed(content)
    assert ways == ["JPEG", "WEBP", "WEBP", "PNG"]


# --- What users' files hold.


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "AVIF"])
def test_lossless_files_of_the_right_size_come_back_exactly(kind) -> None:
    settings = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    image = noise() if kind != "AVIF" else Image.new("RGB", (SIDE, SIDE), (40, 80, 120))
    picture = framed(encoded(image, kind, **settings.get(kind, {})))
    close = 3 if kind == "AVIF" else 0
    assert abs(picture.pixels.astype(int) - np.asarray(image)).max() <= close
    assert (picture.width, picture.height, picture.mode) == (SIDE, SIDE, "RGB")


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_other_formats_come_back_as_rgb(kind) -> None:
    assert pixels_of(encoded(noise(), kind)).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "I;16"])
def test_every_mode_becomes_rgb_bytes(mode) -> None:
    image = noise().convert(mode) if mode != "I;16" else noise("L").convert("I").convert("I;16")
    picture = framed(encoded(image, "TIFF"), resolution=16)
    assert picture.pixels.shape == (16, 16, 3) and picture.pixels.dtype == np.uint8
    assert picture.mode == mode


def test_transparent_pixels_show_the_background_and_not_their_hidden_colour() -> None:
    content = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))
    assert (pixels_of(content, background=(10, 20, 30)) == (10, 20, 30)).all()
    half = pixels_of(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128))))
    assert abs(half.astype(int) - 127).max() <= 1


def test_hidden_colours_do_not_bleed_into_their_neighbours_when_shrunk() -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[:, :33] = (0, 0, 255, 255)
    image[:, 33:] = (255, 0, 0, 0)
    assert (
        pixels_of(encoded(Image.fromarray(image)), resolution=16, background=(0, 0, 255))[..., 0] <= 1
    ).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_shows_the_background(kind) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert (pixels_of(encoded(image, kind, transparency=0)) == 255).all()


@pytest.mark.parametrize("resolution", [16, 8])
@pytest.mark.parametrize("dtype", [np.uint16, ">u2"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(dtype, resolution) -> None:
    grey = np.full((16, 16), 40000, np.uint16)
    if dtype == np.uint16:
        content = encoded(Image.fromarray(grey))
    else:  # Pillow writes no big-endian TIFF.
        tags = [
            (256, 16),
            (257, 16),
            (258, 16),
            (259, 1),
            (262, 1),
            (273, 8),
            (277, 1),
            (278, 16),
            (279, 512),
        ]
        entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
        content = b"MM\0*" + struct.pack(">I", 8 + 512) + grey.astype(">u2").tobytes()
        content += struct.pack(">H", len(tags)) + entries + bytes(4)
    assert (pixels_of(content, resolution=resolution) == round(40000 / 257)).all()


def test_dark_sixteen_bit_grey_stays_dark() -> None:
    assert (pixels_of(encoded(Image.fromarray(np.full((16, 16), 200, np.uint16)))) == 1).all()


def test_scaling_knows_integers_from_floats() -> None:
    assert scale_to_bytes(np.array([0, 65535], np.uint16)).tolist() == [0, 255]
    assert scale_to_bytes(np.array([0, 200], np.int32)).tolist() == [0, 200]
    assert scale_to_bytes(np.array([0.0, 1.0])).tolist() == [0, 255]
    assert scale_to_bytes(np.array([-5.0, 90.0]), (0.0, 60.0)).tolist() == [0, 60]
    for bad in ([0.0, np.nan], [0.0, np.inf], [-1.0, 0.0], [0.0, 256.0]):
        with pytest.raises(ValueError):
            scale_to_bytes(np.array(bad))


def test_values_that_are_no_brightness_are_damage() -> None:
    for value in (np.nan, np.inf, -1.0):
        grey = np.zeros((16, 16), np.float32)
        grey[8, 8] = value
        assert refused(encoded(Image.fromarray(grey), "TIFF")) == "E-IMG-005"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_exif_orientation_is_applied(kind, orientation, fit) -> None:
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32], upright[:20, 32:], upright[20:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright[::-1]),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=oriented(orientation))
    picture = framed(content, resolution=32, fit=fit)
    assert (picture.width, picture.height) == (64, 40)
    corners = picture.pixels[[9, 9, 22, 22], [4, 27, 4, 27]].astype(int)
    expected = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)])
    assert abs(corners - expected).max() <= 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_is_ignored(kind) -> None:
    assert pixels_of(encoded(noise(), kind, exif=b"Exif\0\0garbage")).shape == (SIDE, SIDE, 3)


def test_a_broken_colour_profile_is_ignored() -> None:
    assert np.array_equal(pixels_of(encoded(noise(), icc_profile=b"garbage")), np.asarray(noise()))


def test_a_colour_profile_is_converted_to_srgb() -> None:
    colour = Image.new("LAB", (16, 16), (136, 128 + 20, 128 - 30))
    content = encoded(colour, "TIFF", icc_profile=profile("LAB"))
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(colour, lab, srgb, outputMode="RGB").getpixel((0, 0))
    assert abs(pixels_of(content).astype(int) - expected).max() <= 2


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind, settings in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
        assert (pixels_of(content) == (255, 0, 0)).all(), kind


# --- The square.


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
@pytest.mark.parametrize("resolution", [8, 4, 32])
def test_crop_takes_the_centre(kind, resolution) -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = 200
    for stored in (pixels, np.ascontiguousarray(pixels.transpose(1, 0, 2))):
        square = pixels_of(encoded(Image.fromarray(stored), kind), resolution=resolution)
        assert square.shape == (resolution, resolution, 3) and (square == 200).all()


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
@pytest.mark.parametrize("size", [(32, 16), (16, 32)])
def test_pad_keeps_all_on_the_background(kind, size) -> None:
    square = pixels_of(encoded(Image.new("RGB", size), kind), resolution=16, fit="pad", background=(1, 2, 3))
    square = square if size[0] > size[1] else square.transpose(1, 0, 2)
    assert (square[4:12] == 0).all()
    assert (square[:4] == (1, 2, 3)).all() and (square[12:] == (1, 2, 3)).all()


def test_pad_of_a_thread_keeps_a_line() -> None:
    square = pixels_of(encoded(Image.new("RGB", (8, 4000))), resolution=16, fit="pad")
    assert (square[:, 7] == 0).all() and (np.delete(square, 7, axis=1) == 255).all()


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
def test_shrinking_is_antialiased(kind) -> None:
    board = np.indices((64, 64)).sum(0)[..., None] % 2 * np.full(3, 255)
    content = encoded(Image.fromarray(board.astype(np.uint8)), kind)
    assert abs(pixels_of(content, resolution=16).astype(int) - 127).max() <= 2


# --- What is refused.


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_file_cut_short_is_refused(kind, share) -> None:
    content = encoded(noise(size=(64, 64)), kind)
    assert refused(content[: int(len(content) * share)]) in {"E-IMG-003", "E-IMG-005"}


def test_files_that_are_no_images_are_refused() -> None:
    assert refused(b"") == "E-IMG-001"
    assert refused(b"hello") == "E-IMG-003"
    assert refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "E-IMG-003"
    assert refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "E-IMG-003"


def test_limits_are_those_that_are_set() -> None:
    content = encoded(noise())
    for limits, code in (
        (Limits(max_bytes=10), "E-IMG-002"),
        (Limits(max_pixels=SIDE * SIDE - 1), "E-IMG-004"),
    ):
        with pytest.raises(BadData, match=rf"{code}.*or raise data.max_"):
            decode_square(content, "raw/a.png", Framing(SIDE, "crop", WHITE, limits=limits))
    just = Limits(len(content), SIDE * SIDE)
    decode_square(content, "raw/a.png", Framing(SIDE, "crop", WHITE, limits=just))


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
def test_a_picture_too_large_to_decode_is_refused_before_it_is_decoded(size) -> None:
    assert refused(png_header(*size)) == "E-IMG-004"


def test_a_picture_too_small_to_use_is_refused() -> None:
    assert refused(encoded(Image.new("RGB", (1, 500)))) == "E-IMG-006"


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"])
def test_want_of_memory_is_no_damage(message, monkeypatch) -> None:
    def starve(*_) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("torchvision.io.decode_image", starve)
    with pytest.raises(MemoryError):
        framed(encoded(noise(), "JPEG"))


# --- Pictures of pictures.


def test_box_mean_is_the_mean_of_each_box() -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(box_mean(pixels, 2)[0, 0], np.rint(pixels[:2, :2].mean((0, 1))))
    assert (box_mean(np.full((8, 8, 3), 7, np.uint8), 4) == 7).all()


def test_tiles_lie_in_rows() -> None:
    sheet = tile([np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 3)], columns=2, gap=1)
    assert sheet.shape == (11, 11, 3)
    assert [sheet[2, 2, 0], sheet[2, 7, 0], sheet[7, 2, 0]] == [1, 2, 3]


# --- Whole pictures.


def whole(image: Image.Image, **options: object) -> tuple[np.ndarray, np.ndarray | None]:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return images.decode_full_size(file.getvalue(), "a.png")


def test_a_whole_picture_keeps_its_size_and_values() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (13, 29, 3), dtype=np.uint8)
    pixels, alpha = whole(Image.fromarray(noise))
    np.testing.assert_array_equal(pixels, noise)
    assert alpha is None
    grey, _ = whole(Image.fromarray(noise[..., 0].astype(np.uint16) * 257))
    np.testing.assert_array_equal(grey, np.repeat(noise[..., :1], 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 8
    turned, _ = whole(Image.fromarray(noise), exif=exif)
    np.testing.assert_array_equal(turned, np.rot90(noise))


def test_what_shines_through_a_whole_picture_is_white() -> None:
    shown = np.full((10, 10, 4), 40, np.uint8)
    shown[:5, :, 3], shown[5:, :, 3] = 255, 0
    pixels, alpha = whole(Image.fromarray(shown))
    assert (pixels[:5] == 40).all() and (pixels[5:] == 255).all()
    assert alpha is not None and (alpha == shown[..., 3]).all()
    shown[..., 3] = 255
    assert whole(Image.fromarray(shown))[1] is None


def test_a_transparent_picture_on_white_is_what_it_was_made_from() -> None:
    draw = np.random.default_rng(0)
    alpha = np.full((600, 4), 255, np.uint8)
    alpha[:, :2] = 128
    opacity = np.asarray(Image.fromarray(alpha).resize((8, 1200), Image.Resampling.BICUBIC)) / 255
    colours = draw.integers(0, 256, (1200, 8, 3))
    on_white = np.rint(255 - (255 - colours) * opacity[..., None]).astype(np.uint8)
    made = images.with_alpha(on_white, alpha)
    assert made.shape == (1200, 8, 4)
    again = 255 - (255 - made[..., :3].astype(float)) * (made[..., 3:] / 255)
    assert np.abs(again - on_white).max() <= 1
    clear = images.with_alpha(np.full((16, 16, 3), 255, np.uint8), np.zeros((8, 8), np.uint8))
    assert not clear[..., 3].any() and (clear[..., :3] == 255).all()


@pytest.mark.parametrize(("content", "code"), [(b"", "E-IMG-001"), (b"words", "E-IMG-003")])
def test_a_whole_picture_that_is_none_is_refused(content: bytes, code: str) -> None:
    with pytest.raises(BadData, match=code):
        images.decode_full_size(content, "a.png")
