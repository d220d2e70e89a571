"""Files that nobody should have to decode, and odd ones that decode all the same: some 500, made from a seed.

A case says whether a picture must come of it (`ok`, and then what must be seen), an error (`bad`, and then
which), or either. Frame them at `RESOLUTION` on `BACKGROUND`, as a crop.
"""

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageDraw

from pipeline.prepare import photos
from pipeline.prepare.framing import DecodedImage
from pipeline.prepare.images import FORMATS

PLUGINS = {"HEIC": "HEIF", "JPEG XL": "JXL"}  # Pillow's names of what the extra `photos` decodes
KINDS = (*FORMATS, *(kind for name, kind in PLUGINS.items() if photos.plugin(name)))
RESOLUTION = 32
BACKGROUND = (255, 255, 255)
SIDE = 48
SETTINGS = {
    "WEBP": {"lossless": True},
    "AVIF": {"speed": 10},
    "JXL": {"lossless": True},
    "HEIF": {"quality": 90},
    "JPEG": {"quality": 95},
}
RED, BLUE = (250, 10, 10), (10, 10, 250)

Check = Callable[[DecodedImage], bool]


class Case(NamedTuple):
    """A file, and what must come of it."""

    name: str
    content: bytes
    expect: str  # ok, bad or either
    check: Check = lambda picture: True  # of an ok picture
    codes: tuple[str, ...] = ()  # of a bad file; empty: any


def cases(seed: int = 0) -> list[Case]:
    """The whole corpus, the same for the same seed."""
    draw = np.random.default_rng(seed)
    return [
        *truncations(draw), *flips(draw), *no_images(draw), *header_bombs(), *text_bombs(), *frame_bombs(),
        *small(), *modes(), *deep(), *orientations(), *profiles(), *animations(), *vectors(), *disguises(),
        *polyglots(), *metadata(), *duplicates(draw),
    ]  # fmt: skip


# --- Making files.


def encode(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **SETTINGS.get(kind, {}) | settings)
    return buffer.getvalue()


def flat(colour: object = RED, mode: str = "RGB", side: int = SIDE) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def textured(draw: np.random.Generator, side: int = SIDE) -> Image.Image:
    coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, row: bytes, before: bytes = b"", after: bytes = b"",
        interlace: int = 0, rows: int | None = None) -> bytes:  # fmt: skip
    """A PNG all of whose rows are alike; `rows`: how many there are, if not `height`."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(b"\0" + row) for _ in range(height if rows is None else rows))
    data = chunk(b"IDAT", body + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + data + after + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of (tag, type, count, value) whose data begin at byte 8."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def grey_tiff(
    width: int, height: int, data: bytes, *more: tuple[int, int, int, int], following: int = 0
) -> bytes:
    plain = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    changed = {tag[0] for tag in more}
    tags = [(tag, 4, 1, value) for tag, value in plain.items() if tag not in changed]
    return tiff(*tags, *more, data=data, following=following)


def gif(width: int, height: int, frames: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(RED + BLUE) + frames + b";"


def gif_frame(width: int, height: int) -> bytes:
    """A frame of which only a few pixels are there."""
    return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def bmp(width: int, height: int, data: bytes, bits: int = 24, compression: int = 0, size: int = 40) -> bytes:
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def resized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG that claims another size."""
    content = bytearray(encode(flat(), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


# --- Seeing what came.


def seen(colour: tuple[int, ...], off: int = 4) -> Check:
    """The whole picture has that colour."""
    return lambda picture: bool(abs(picture.pixels.astype(int) - colour).max() <= off)


def close_to(image: Image.Image, off: float = 2.0) -> Check:
    """On average, the picture is no further than that from the image, resampled."""
    small = image.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
    return lambda picture: bool(abs(picture.pixels.astype(int) - np.asarray(small)).mean() <= off)


# --- Damage.


def samples(draw: np.random.Generator) -> dict[str, tuple[Image.Image, bytes]]:
    """A valid file of each accepted format, and what it shows."""
    images = {kind: textured(draw) for kind in KINDS}
    return {kind: (image, encode(image, kind)) for kind, image in images.items()}


def truncations(draw: np.random.Generator, cuts: int = 20) -> Iterator[Case]:
    for kind, (_, content) in samples(draw).items():
        for cut in range(cuts):
            kept = content[: 1 + len(content) * cut // (cuts + 1)]
            yield Case(f"cut-{cut}.{kind.lower()}", kept, "bad", codes=("E-IMG-003", "E-IMG-005"))


def flips(draw: np.random.Generator, times: int = 20) -> Iterator[Case]:
    for kind, (_, content) in samples(draw).items():
        for number in range(times):
            mutant = bytearray(content)
            mutant[draw.integers(len(mutant))] ^= 1 << draw.integers(8)
            yield Case(f"flip-{number}.{kind.lower()}", bytes(mutant), "either")


def no_images(draw: np.random.Generator) -> Iterator[Case]:
    noise = draw.bytes(2000)
    yield Case("empty.png", b"", "bad", codes=("E-IMG-001",))
    heads = {
        "zero": b"\0", "zeros": bytes(1000), "space": b" " * 100, "noise": noise, "text": b"hello\n",
        "elf": b"\x7fELF" + noise, "zip": b"PK\x03\x04" + noise, "mp4": b"\0\0\0\x20ftypisom" + noise,
        "png": b"\x89PNG\r\n\x1a\n" + noise, "jpeg": b"\xff\xd8\xff\xe0" + noise, "gif": b"GIF89a" + noise[:300],
        "bmp": b"BM" + noise, "tiff": b"II*\0\x08\0\0\0" + noise, "webp": b"RIFF\xff\0\0\0WEBPVP8 " + noise,
        "avif": b"\0\0\0\x1cftypavif" + noise,
    }  # fmt: skip
    for name, head in heads.items():
        yield Case(
            f"only-{name}.png", head, "bad", codes=("E-IMG-003", "E-IMG-005", "E-IMG-004", "E-IMG-006")
        )
    image, content = samples(draw)["PNG"]
    for suffix in ("jpg", "gif", "txt", "exe", "svg"):
        yield Case(f"a-png.{suffix}", content, "ok", close_to(image))
    yield Case("jpeg-head-png-body.png", encode(image, "JPEG")[:20] + content[20:], "bad")
    yield Case("png-head-jpeg-body.jpg", content[:20] + encode(image, "JPEG")[20:], "bad")


# --- Bombs.


def header_bombs() -> Iterator[Case]:
    """Files that declare far more than they hold, and honest ones on either side of the limit."""
    many = ("E-IMG-004",)
    for name, width, height in (
        ("89M", 9455, 9456), ("179M", 13380, 13380), ("4e18", 2**31 - 1, 2**31 - 1), ("wide", 2**31 - 1, 8),
        ("65M", 8001, 8000),
    ):  # fmt: skip
        yield Case(f"declares-{name}.png", png(width, height, 8, 2, b"", rows=0), "bad", codes=many)
    # Where the data end in good order but too early, decoders leave the rest black or grey.
    for interlace in (0, 1):
        content = png(7000, 7000, 8, 2, bytes(21000), rows=2, interlace=interlace)
        yield Case(f"declares-49M-has-2-rows-{interlace}.png", content, "either")
    yield Case("49M.jpg", resized_jpeg(7000, 7000), "either")
    yield Case("64M.png", png(8000, 8000, 8, 0, bytes(8000)), "ok", seen((0, 0, 0), 0))
    yield Case("81M.png", png(9000, 9000, 1, 0, bytes(1125)), "bad", codes=many)
    yield Case("4G.gif", gif(65535, 65535, gif_frame(65535, 65535)), "bad", codes=many)
    yield Case("49M.gif", gif(7000, 7000, gif_frame(7000, 7000)), "bad", codes=("E-IMG-005",))
    yield Case("frame-beyond.gif", gif(16, 16, gif_frame(65535, 65535)), "either")
    yield Case("4G.tif", grey_tiff(65535, 65535, bytes(64)), "bad", codes=many)
    yield Case("2-to-62.tif", grey_tiff(2**31, 2**31, bytes(64)), "bad")
    yield Case("62M-of-64-bytes.tif", grey_tiff(7900, 7900, bytes(64)), "bad", codes=("E-IMG-005",))
    packed = zlib.compress(bytes(7900 * 7900), 9)
    yield Case("deflated-62M.tif", grey_tiff(7900, 7900, packed, (259, 4, 1, 8)), "ok", seen((0, 0, 0), 0))
    short = zlib.compress(bytes(10), 9)
    yield Case("deflated-10.tif", grey_tiff(7900, 7900, short, (259, 4, 1, 8)), "either")
    yield Case("loop.tif", grey_tiff(16, 16, bytes(256), following=8 + 256), "ok", seen((0, 0, 0), 0))
    for count in (2**32 - 1, 2**28):
        yield Case(f"strips-{count}.tif", grey_tiff(16, 16, bytes(256), (273, 4, count, 8)), "either")
        yield Case(f"text-{count}.tif", grey_tiff(16, 16, bytes(256), (270, 2, count, 8)), "either")
    yield Case("no-tags.tif", tiff(), "bad")
    yield Case("beyond.tif", b"II*\0\xf0\xff\xff\xff", "bad")
    yield Case("4G.jpg", resized_jpeg(65500, 65500), "bad", codes=many)
    yield Case("4e18.bmp", bmp(2**31 - 1, 2**31 - 1, b""), "bad")
    yield Case("negative.bmp", bmp(-16, 16, bytes(768)), "bad")
    yield Case("lowest.bmp", bmp(16, -(2**31), bytes(768)), "bad")
    yield Case("49M.bmp", bmp(7000, 7000, bytes(768)), "bad", codes=("E-IMG-005",))
    yield Case("header-of-4G.bmp", bmp(16, 16, bytes(768), size=2**32 - 1), "bad")
    yield Case("runs.bmp", bmp(7000, 7000, b"\xff\0" * 50, bits=8, compression=1), "either")
    extent = struct.pack("<I", 16383)[:3] * 2
    yield Case("268M.webp", webp((b"VP8X", b"\2\0\0\0" + extent), (b"ANIM", bytes(6))), "bad")
    bits = struct.pack("<I", 16382 | 16382 << 14)
    yield Case("268M-lossless.webp", webp((b"VP8L", b"\x2f" + bits + bytes(20))), "bad")
    content = encode(flat(), "AVIF")
    at = content.index(b"ispe") + 8
    for width, height in ((65536, 65536), (7900, 7900), (0, 0)):
        declared = content[:at] + struct.pack(">II", width, height) + content[at + 8 :]
        yield Case(f"declares-{width}.avif", declared, "either" if width == 7900 else "bad")


def text_bombs() -> Iterator[Case]:
    zeros = zlib.compress(bytes(50 * 2**20), 9)
    some = zlib.compress(bytes(2**20 - 100), 9)
    row = bytes(RED) * 16
    damaged = ("E-IMG-005",)
    bombs = {
        "zTXt": chunk(b"zTXt", b"a\0\0" + zeros),
        "iTXt": chunk(b"iTXt", b"a\0\1\0\0\0" + zeros),
        "iCCP": chunk(b"iCCP", b"a\0\0" + zeros),
        "many": b"".join(chunk(b"zTXt", b"a%d\0\0" % number + some) for number in range(70)),
    }
    for name, bomb in bombs.items():
        yield Case(f"{name}-bomb.png", png(16, 16, 8, 2, row, before=bomb), "bad", codes=damaged)
    # What comes after the pixels of a plain file is never unpacked.
    after = png(16, 16, 8, 2, row, after=bombs["zTXt"])
    yield Case("bomb-behind.png", after, "either")


def frame_bombs() -> Iterator[Case]:
    red = Image.new("RGB", (16, 16), RED)
    blue = Image.new("RGB", (16, 16), BLUE)
    content = encode(red, "WEBP", save_all=True, append_images=[blue])
    at = content.rindex(b"ANMF")
    many = content + content[at:] * 10_000
    yield Case("10k-frames.webp", many[:4] + struct.pack("<I", len(many) - 8) + many[8:], "ok", seen(RED))
    gif_red = encode(red, "GIF", save_all=True, append_images=[blue])
    at = gif_red.rindex(b"!\xf9")
    yield Case("10k-frames.gif", gif_red[:-1] + gif_red[at:-1] * 10_000 + b";", "ok", seen(RED))
    control = b"".join(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) for _ in range(2))
    yield Case("2e9-frames.png", png(16, 16, 8, 2, bytes(RED) * 16, before=control), "either")


# --- Sizes.


def small() -> Iterator[Case]:
    tiny = ("E-IMG-006",)
    for width, height in ((0, 0), (0, 8), (8, 0)):
        yield Case(f"{width}x{height}.png", png(width, height, 8, 2, bytes(3 * width)), "bad")
        yield Case(f"{width}x{height}.bmp", bmp(width, height, b""), "bad")
    yield Case("0x0.gif", gif(0, 0, gif_frame(0, 0)), "bad")
    for width, height in ((1, 1), (1, 65500), (65500, 1), (7, 8), (8, 7)):
        for kind in ("PNG", "JPEG", "BMP"):
            content = encode(Image.new("RGB", (width, height)), kind)
            yield Case(f"{width}x{height}.{kind.lower()}", content, "bad", codes=tiny)
    for kind in KINDS:
        content = encode(Image.new("RGB", (8, 8), RED), kind)
        yield Case(f"8x8.{kind.lower()}", content, "ok", seen(RED, 12))
        yield Case(
            f"8x300.{kind.lower()}", encode(Image.new("RGB", (8, 300), RED), kind), "ok", seen(RED, 12)
        )


# --- Pixel formats.


def modes() -> Iterator[Case]:
    """Flat pictures in every mode that a format has."""
    red = flat()
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    clear = flat((*RED, 0), "RGBA")
    half = seen((252, 132, 132))
    yield Case("bits.png", encode(flat(1, "1")), "ok", seen((255, 255, 255), 0))
    yield Case("bits.tif", encode(flat(0, "1"), "TIFF", compression="group4"), "ok", seen((0, 0, 0), 0))
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"):
        yield Case(f"grey.{kind.lower()}", encode(flat(99, "L"), kind), "ok", seen((99, 99, 99), 1))
        yield Case(f"rgb.{kind.lower()}", encode(red, kind), "ok", seen(RED, 3))
    for kind in ("PNG", "TIFF", "WEBP"):
        yield Case(f"clear.{kind.lower()}", encode(clear, kind, exact=True), "ok", seen(BACKGROUND, 1))
        yield Case(f"half.{kind.lower()}", encode(flat((*RED, 128), "RGBA"), kind), "ok", half)
    for kind in ("PNG", "TIFF"):
        yield Case(f"grey-clear.{kind.lower()}", encode(flat((9, 0), "LA"), kind), "ok", seen(BACKGROUND, 1))
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        yield Case(f"palette.{kind.lower()}", encode(palette, kind), "ok", seen(RED))
    for kind in ("PNG", "GIF"):
        hidden = encode(palette, kind, transparency=palette.getpixel((0, 0)))
        yield Case(f"palette-clear.{kind.lower()}", hidden, "ok", seen(BACKGROUND, 1))
    yield Case("colour-key.png", encode(red, transparency=RED), "ok", seen(BACKGROUND, 1))
    yield Case("grey-key.png", encode(flat(99, "L"), transparency=99), "ok", seen(BACKGROUND, 1))
    cmyk = flat((0, 255, 255, 0), "CMYK")
    yield Case("cmyk.tif", encode(cmyk, "TIFF"), "ok", seen((255, 0, 0), 3))
    content = encode(cmyk, "JPEG")
    yield Case("cmyk.jpg", content, "ok", seen((255, 0, 0), 6))
    at = content.index(b"Adobe") + 11
    yield Case("ycck.jpg", content[:at] + b"\2" + content[at + 1 :], "ok")
    yield Case("lab.tif", encode(flat((255, 128, 128), "LAB"), "TIFF"), "ok", seen((255, 255, 255), 4))
    yield Case("progressive.jpg", encode(red, "JPEG", progressive=True), "ok", seen(RED, 4))
    for depth, value in ((1, 255), (2, 170), (4, 119)):
        full = (1 << depth) - 1
        step = round(value / 255 * full)
        row = bytes([sum(step << shift for shift in range(0, 8, depth))]) * (16 * depth // 8)
        yield Case(f"grey-{depth}.png", png(16, 16, depth, 0, row), "ok", seen((value,) * 3, 1))
        table = chunk(b"PLTE", bytes(RED) * (full + 1))
        yield Case(f"palette-{depth}.png", png(16, 16, depth, 3, row, before=table), "ok", seen(RED, 0))
    yield Case("no-palette.png", png(16, 16, 8, 3, bytes(16)), "either")
    yield Case(
        "palette-overrun.png", png(16, 16, 8, 3, b"\xff" * 16, before=chunk(b"PLTE", bytes(6))), "either"
    )
    for colour, depth in ((1, 8), (5, 8), (2, 4), (0, 32), (3, 16)):
        yield Case(f"colour-{colour}-depth-{depth}.png", png(16, 16, depth, colour, bytes(200)), "bad")


def deep() -> Iterator[Case]:
    """More than 8 bits a value."""
    value = struct.pack(">H", 40000)
    shade = seen((round(40000 / 257),) * 3, 1)
    for name, colour, pixel in (("grey", 0, value), ("rgb", 2, value * 3), ("rgba", 6, value * 3 + b"\xff\xff"),
                                ("la", 4, value + b"\xff\xff")):  # fmt: skip
        yield Case(f"{name}-16.png", png(16, 16, 16, colour, pixel * 16), "ok", shade)
    yield Case("16.tif", encode(Image.fromarray(np.full((16, 16), 40000, np.uint16)), "TIFF"), "ok", shade)
    yield Case(
        "dark-16.tif",
        encode(Image.fromarray(np.full((16, 16), 200, np.uint16)), "TIFF"),
        "ok",
        seen((1,) * 3),
    )
    for name, level, grey in (("unit", 0.5, 128), ("byte", 200.0, 200), ("black", 0.0, 0)):
        pixels = np.full((16, 16), level, np.float32)
        yield Case(f"float-{name}.tif", encode(Image.fromarray(pixels), "TIFF"), "ok", seen((grey,) * 3, 1))
    for level in (np.nan, np.inf, -np.inf, -1.0, 1e30):
        pixels = np.zeros((16, 16), np.float32)
        pixels[8, 8] = level
        yield Case(f"float-{level}.tif", encode(Image.fromarray(pixels), "TIFF"), "bad", codes=("E-IMG-005",))
    for level, expect in ((-5, "bad"), (2**31 - 1, "bad"), (40000, "ok")):
        pixels = np.full((16, 16), level, np.int32)
        yield Case(f"int-{level}.tif", encode(Image.fromarray(pixels), "TIFF"), expect, shade)


# --- Orientation and colour.


def quarters() -> Image.Image:
    """Red, green, blue and black quarters, 48 x 32."""
    image = Image.new("RGB", (48, 32))
    pencil = ImageDraw.Draw(image)
    for left, top, colour in ((0, 0, (250, 0, 0)), (24, 0, (0, 250, 0)), (0, 16, (0, 0, 250))):
        pencil.rectangle((left, top, left + 23, top + 15), colour)
    return image


def in_quarters(picture: DecodedImage) -> bool:
    corners = picture.pixels[[3, 3, -4, -4], [3, -4, 3, -4]].astype(int)
    expected = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)])
    return bool(abs(corners - expected).max() <= 12) and (picture.width, picture.height) == (48, 32)


def exif(**tags: object) -> Image.Exif:
    filled = Image.Exif()
    for tag, value in tags.items():
        filled[int(tag.strip("_"), 16)] = value
    return filled


def orientations() -> Iterator[Case]:
    turn = Image.Transpose
    stored = {
        1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    for number, turned in stored.items():
        image = quarters() if turned is None else quarters().transpose(turned)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            settings = {"subsampling": 0} if kind == "JPEG" else {}
            content = encode(image, kind, exif=exif(_0112=number), **settings)
            yield Case(f"orientation-{number}.{kind.lower()}", content, "ok", in_quarters)
    for odd in (0, 9, 65535):
        content = encode(quarters(), "JPEG", subsampling=0, exif=exif(_0112=odd))
        yield Case(f"orientation-{odd}.jpg", content, "ok", in_quarters)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(primaries: list[tuple[float, float, float]], gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC display profile of three primaries (D50 XYZ) and one gamma, as ICC.1:2001 describes it."""
    text = b"text\0\0\0\0none\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    points = [b"XYZ \0\0\0\0" + b"".join(map(fixed, point)) for point in [*primaries, (0.9642, 1.0, 0.8249)]]
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"none\0" + bytes(78)
    names = [b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt", b"rTRC", b"gTRC", b"bTRC", b"desc", b"cprt"]
    blocks = [block + bytes(-len(block) % 4) for block in [*points, curve, curve, curve, description, text]]
    table, offset = struct.pack(">I", len(names)), 132 + 12 * len(names)
    for name, block in zip(names, blocks, strict=True):
        table += name + struct.pack(">II", offset, len(block))
        offset += len(block)
    head = struct.pack(">I4sI4s4s4s", offset, bytes(4), 0x02100000, b"mntr", space, b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + b"".join(map(fixed, (0.9642, 1.0, 0.8249))) + bytes(48)
    return head + table + b"".join(blocks)


ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]


def profiles() -> Iterator[Case]:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    srgb = srgb[:24] + bytes(12) + srgb[36:]  # without the time of day
    muted = (100, 200, 100)
    exact = seen(muted, 3)
    named = {
        "srgb": (srgb, exact),
        "adobe": (profile(ADOBE, 2.2), lambda picture: bool((picture.pixels[..., 0] < 60).all())),
        "p3": (profile(P3, 2.2), lambda picture: bool((picture.pixels[..., 0] < 85).all())),
        "garbage": (b"garbage" * 20, exact),
        "cut": (srgb[:200], exact),
        "cmyk": (profile(ADOBE, 2.2, b"CMYK"), exact),
        "grey": (profile(ADOBE, 2.2, b"GRAY"), exact),
        "zeros": (bytes(500), exact),
    }
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        for name, (data, check) in named.items():
            content = encode(flat(muted), kind, icc_profile=data)
            yield Case(f"icc-{name}.{kind.lower()}", content, "ok", check)
    huge = profile(ADOBE, 2.2) + bytes(2 * 2**20)
    content = encode(flat(muted), "JPEG", icc_profile=huge)
    yield Case("icc-2MB.jpg", content, "ok", named["adobe"][1])
    content = encode(flat(muted), "PNG", icc_profile=huge)
    yield Case("icc-2MB.png", content, "bad", codes=("E-IMG-005",))


# --- Animations.


def timeless(content: bytes) -> bytes:
    """An animated AVIF without the time of day in its headers."""
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        at = content.index(box) + 8
        content = content[:at] + bytes(16) + content[at + 16 :]
    return content


def animations() -> Iterator[Case]:
    frames = [flat(), flat(BLUE), flat((10, 250, 10))]
    for kind in ("GIF", "WEBP", "PNG", "AVIF", "TIFF"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        content = timeless(content) if kind == "AVIF" else content
        yield Case(f"animated.{kind.lower()}", content, "ok", seen(RED, 6))
        yield Case(f"animated-cut.{kind.lower()}", content[: len(content) * 3 // 4], "either")
    clear = [flat((*colour, 0), "RGBA") for colour in (RED, BLUE)]
    for kind in ("WEBP", "PNG"):
        content = encode(clear[0], kind, save_all=True, append_images=clear[1:])
        yield Case(f"animated-clear.{kind.lower()}", content, "ok", seen(BACKGROUND, 1))


# --- What is no picture of ours.


def svg(body: str, head: str = "", size: str = 'width="64" height="64"') -> bytes:
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<?xml version="1.0"?>{head}<svg {space} {size}>{body}</svg>'.encode()


def doubled(times: int) -> str:
    levels = [f'<g id="g{n + 1}"><use href="#g{n}"/><use href="#g{n}"/></g>' for n in range(times)]
    return f'<defs><rect id="g0" width="1" height="1"/>{"".join(levels)}</defs><use href="#g{times}"/>'


def vectors() -> Iterator[Case]:
    """SVG in its dangerous forms. None is a pixel image, so none is ever opened as XML."""
    rect = '<rect width="9" height="9"/>'
    laughs = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
    external = '<!DOCTYPE svg [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    links = ["file:///etc/passwd", "/etc/passwd", "../../secret.png", "secret.png", "http://127.0.0.1:9/a.png",
             "https://127.0.0.1:9/a.png", "ftp://127.0.0.1/a", "data:image/png;base64,AAAA", "data:text/xml,<a/>",
             "javascript:alert(1)", "file://localhost/etc/passwd", "//127.0.0.1/a.png"]  # fmt: skip
    bodies = {f"image-{number}": svg(f'<image href="{link}"/>') for number, link in enumerate(links)}
    bodies |= {
        f"xlink-{number}": svg(f'<image xlink:href="{link}"/>') for number, link in enumerate(links[:5])
    }
    bodies |= {
        "plain": svg(rect),
        "import": svg("<style>@import url('file:///etc/passwd');</style>"),
        "url": svg('<rect fill="url(file:///etc/passwd#a)"/>'),
        "style-url": svg("<rect style=\"fill:url('http://127.0.0.1:9/a#b')\"/>"),
        "stylesheet": svg(rect, '<?xml-stylesheet href="file:///etc/passwd"?>'),
        "xinclude": svg('<i:include xmlns:i="http://www.w3.org/2001/XInclude" href="file:///etc/passwd"/>'),
        "entity": svg("<text>&e;</text>", external),
        "parameter-entity": svg(rect, '<!DOCTYPE svg [<!ENTITY % e SYSTEM "http://127.0.0.1:9/e"> %e;]>'),
        "laughs": svg("<text>&l9;</text>", f'<!DOCTYPE svg [<!ENTITY l0 "ha">{laughs}]>'),
        "quadratic": svg("&a;" * 5000, f'<!DOCTYPE svg [<!ENTITY a "{"a" * 5000}">]>'),
        "use-1e5": svg(doubled(17)),
        "use-1e7": svg(doubled(24)),
        "use-itself": svg('<g id="a"><use href="#a"/></g>'),
        "deep": svg("<g>" * 5000 + "</g>" * 5000),
        "60000": svg(rect, size='width="60000" height="60000"'),
        "1e9": svg(rect, size='width="1e9" height="1e9"'),
        "no-size": svg(rect, size=""),
        "nan": svg(rect, size='width="NaN" height="NaN"'),
        "script": svg("<script>while(1);</script>"),
        "foreign": svg('<foreignObject><iframe src="file:///etc/passwd"/></foreignObject>'),
        "filter": svg('<filter id="f"><feGaussianBlur stdDeviation="1e6"/></filter><rect filter="url(#f)"/>'),
        "font": svg("<style>@font-face{font-family:a;src:url(file:///etc/passwd)}</style>"),
        "gz": gzip.compress(svg(rect), mtime=0),
        "gz-bomb": gzip.compress(svg(" " * 20_000_000), mtime=0),
        "utf16": svg(rect).decode().encode("utf-16"),
        "utf7": b'<?xml version="1.0" encoding="UTF-7"?>+ADw-svg/+AD4-',
        "bom": b"\xef\xbb\xbf" + svg(rect),
    }
    for name, content in bodies.items():
        yield Case(f"{name}.svg", content, "bad", codes=("E-IMG-003",))


def disguises() -> Iterator[Case]:
    """Formats that Pillow would open, some of them by starting programs."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\nshowpage\n"
    bodies = {
        "eps": eps,
        "eps-binary": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(eps), 0, 0, 0, 0) + bytes(4) + eps,
        "ps": b"%!PS\n(%pipe%id) (r) file\n",
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n",
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(2) + struct.pack("<hhhhH", 0, 0, 640, 640, 1440) + bytes(40),
        "emf": struct.pack("<II", 1, 88) + bytes(32) + b" EMF" + bytes(60),
    }
    for kind in ("PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "JPEG2000", "EPS", "XBM"):
        bodies[f"as-{kind.lower()}"] = encode(flat(1, "1") if kind == "XBM" else flat(), kind)
    for name, content in bodies.items():
        yield Case(f"{name}.png", content, "bad", codes=("E-IMG-003",))


def polyglots() -> Iterator[Case]:
    red, blue = flat(), flat(BLUE)
    pkzip = b"PK\x05\x06" + bytes(18)
    after = {"zip": pkzip, "svg": svg("<script/>"), "png": encode(blue), "php": b"<?php system('id'); ?>"}
    for kind in ("PNG", "JPEG", "GIF"):
        for name, tail in after.items():
            yield Case(f"{kind.lower()}-then-{name}.png", encode(red, kind) + tail, "ok", seen(RED, 4))
    for name, head in (("pdf", b"%PDF-1.7\n"), ("html", b"<html>"), ("script", b"#!/bin/sh\nid\n")):
        yield Case(f"{name}-then-png.png", head + encode(red), "bad", codes=("E-IMG-003",))
    yield Case("script.gif", b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)", "bad")


# --- Metadata and duplicates.


def metadata() -> Iterator[Case]:
    red = flat()
    laughs = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
    entity = f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><x:xmpmeta>&l9;</x:xmpmeta>'.encode()
    place = Image.Exif()
    place[0x010E] = "\x1b[31m\n{0.__class__} $(id)"
    place.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 29.9), 3: "E", 4: (2.0, 17.0, 40.2)})
    loop = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8)
    for kind in ("JPEG", "PNG", "WEBP"):
        suffix = kind.lower()
        yield Case(f"gps.{suffix}", encode(red, kind, exif=place), "ok", seen(RED))
        yield Case(f"exif-loop.{suffix}", encode(red, kind, exif=loop), "ok", seen(RED))
        yield Case(
            f"exif-garbage.{suffix}", encode(red, kind, exif=b"Exif\0\0" + b"\xff" * 999), "ok", seen(RED)
        )
        yield Case(f"xmp-entity.{suffix}", with_xmp(red, kind, entity), "ok", seen(RED))
    comment = encode(red, "JPEG", comment=b"\x1b[2J\n" * 10_000)
    yield Case("comment-50k.jpg", comment, "ok", seen(RED))
    yield Case("comment-64k.gif", encode(red, "GIF", comment=b"\n\x1b" * 32_000), "ok", seen(RED))
    for name, text in (
        ("ansi", b"Title\0\x1b[31m\n\r"),
        ("long", b"a\0" + b"b" * 60_000),
        ("unkeyed", b"\0\0\0"),
    ):
        content = png(16, 16, 8, 2, bytes(RED) * 16, before=chunk(b"tEXt", text))
        yield Case(f"text-{name}.png", content, "ok", seen(RED, 0))
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="%s"/></x:xmpmeta>'
    for value in (b"1", b"99999999999999999999", b"-1"):
        yield Case(
            f"xmp-orientation-{value.decode()}.jpg", with_xmp(red, "JPEG", packet % value), "ok", seen(RED)
        )


def with_xmp(image: Image.Image, kind: str, packet: bytes) -> bytes:
    if kind != "PNG":
        return encode(image, kind, xmp=packet)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    content = encode(image)
    return content[:33] + text + content[33:]


def duplicates(draw: np.random.Generator) -> Iterator[Case]:
    image = textured(draw)
    near = image.copy()
    near.putpixel((0, 0), (1, 2, 3))
    for name, content in (
        ("first.png", encode(image)), ("second.png", encode(image)), ("third.bmp", encode(image, "BMP")),
        ("fourth.tif", encode(image, "TIFF")), ("fifth.webp", encode(image, "WEBP")), ("near.png", encode(near)),
        ("deflated.tif", encode(image, "TIFF", compression="tiff_deflate")),
        ("lzw.tif", encode(image, "TIFF", compression="tiff_lzw")),
        ("alpha.png", encode(image.convert("RGBA"))), ("jpeg.jpg", encode(image, "JPEG", subsampling=0)),
    ):  # fmt: skip
        yield Case(f"duplicate-{name}", content, "ok", close_to(image))
