"""From a file's bytes to a square of pixels: decode, crop or pad, resample, turn upright, convert, flatten.

Safe on files that nobody has looked at: formats are an allowlist, sizes are checked before pixels are decoded,
and whatever is wrong is a `BadData` with an E-IMG code. Plain files take a quick way through torchvision and
kornia-rs, all others a thorough one through Pillow; the two agree within rounding. Pictures are uint8, height x
width x 3, in sRGB; of an animation, the first frame. What a file may do to its process is the matter of decoder.py.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from pipeline.errors import BadData

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_BYTES = 64 * 2**20
COPIED_PIXELS = 2**24  # of a PNG; the copies of a larger one would not fit into a decoder's memory
MAX_PIXELS = 64 * 10**6
MIN_SIDE = 8

_ORIENTATION = 0x0112  # the EXIF tag
# How chunks begin that may hold an orientation.
_PNG_EXIF = (b"eXIf", b"tEXtRaw profile type", b"zTXtRaw profile type", b"iTXtXML:com.adobe.xmp")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width, height


class Framing(NamedTuple):
    """How a picture of any shape becomes a square.

    fit: "crop" takes the largest centred square, "pad" puts the whole picture on the background colour.
    background: red, green, blue (0-255), also put behind transparent pixels.
    """

    resolution: int
    fit: str
    background: tuple[int, ...]


class Picture(NamedTuple):
    """A framed picture, and what its file was like."""

    pixels: Pixels  # [R, R, 3], sRGB
    width: int  # px of the file, upright
    height: int
    mode: str  # Pillow's name of the file's pixel format, such as RGB, P or I;16


class Cut(NamedTuple):
    """The part of a picture to keep, and the size to give it."""

    left: int
    top: int
    right: int
    bottom: int
    size: Size


def frame(content: bytes, where: str, framing: Framing) -> Picture:
    """Decode an image file, completely, and make it a square.

    Resampling is bicubic, antialiased where it shrinks, on the file's own values (palettes expanded).

    Args:
        content: the bytes of the file.
        where: its name, for messages.
        framing: resolution, fit and background.

    Raises:
        BadData: E-IMG-001 empty, 002 too many bytes, 003 no accepted format, 004 too many pixels,
            005 damaged, 006 too small.
        MemoryError: this process may not have as much as decoding needs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in files that decode all the same.
        image = _open(content, where)
        mode, size = image.mode, image.size
        try:
            pixels = _quick(content, image, framing) if _is_plain(content, image) else None
            if pixels is None:
                image.load()
                turn = _UPRIGHT.get(
                    _orientation(image)
                )  # of a TIFF, Pillow has turned pixels and size itself
                size = _turned(image.size, turn)
                pixels = _thorough(image, turn, framing)
            return Picture(_padded(pixels, framing), *size, mode)
        except MemoryError:
            raise
        except Exception as exc:  # Decoders of damaged bytes raise whatever they meet.
            raise _damaged(where, exc) from None


def whole(content: bytes, where: str) -> tuple[Pixels, Pixels | None]:
    """Decode an image file at its own size, upright: (sRGB [H,W,3], alpha [H,W], or None where all is opaque).

    What shines through is composited on white. Raises as `frame` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(content, where)
        try:
            image.load()
            turn, profile = _UPRIGHT.get(_orientation(image)), image.info.get("icc_profile")
            image = _continuous(image)
            if turn is not None:
                image = image.transpose(turn)
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(scale_to_bytes(np.asarray(image)))
            alpha = np.array(image.getchannel("A"), np.uint8) if image.mode == "RGBA" else None
            pixels = np.array(_flat(image, profile, (255, 255, 255)), np.uint8)
        except MemoryError:
            raise
        except Exception as exc:  # As in `frame`.
            raise _damaged(where, exc) from None
    return pixels, alpha if alpha is not None and alpha.min() < 255 else None


def with_alpha(pixels: Pixels, alpha: Pixels) -> Pixels:
    """An enlarged picture on white [fH,fW,3] with the transparency [H,W] it once had, enlarged by bicubic
    interpolation: [fH,fW,4], which on white is `pixels` again where it can be."""
    height, width, _ = pixels.shape
    enlarged = np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC))
    made = np.empty((height, width, 4), np.uint8)
    made[..., 3] = enlarged
    for top in range(0, height, 256):  # few rows at a time: floats are large
        rows = slice(top, top + 256)
        opacity = np.maximum(enlarged[rows, :, None].astype(np.float32), 1) / 255
        colours = 255 - (255 - pixels[rows].astype(np.float32)) / opacity
        made[rows, :, :3] = np.rint(np.clip(colours, 0, 255))
    return made


def check_bytes(content: bytes, where: str) -> None:
    """Raises BadData E-IMG-001 where a file is empty, E-IMG-002 where it has more than MAX_BYTES."""
    if not content:
        raise BadData("E-IMG-001", where, "is empty", "export it again, or remove it")
    if len(content) > MAX_BYTES:
        problem = f"has {len(content)} bytes, the most is {MAX_BYTES}"
        raise BadData("E-IMG-002", where, problem, "scale it down")


def _open(content: bytes, where: str) -> Image.Image:
    """The file with its header read and its size accepted, and no pixel decoded."""
    check_bytes(content, where)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        problem = f"has more than {MAX_PIXELS} pixels"
        raise BadData("E-IMG-004", where, problem, "scale it down") from None
    except UnidentifiedImageError:
        problem = f"is none of {', '.join(FORMATS)}"
        raise BadData("E-IMG-003", where, problem, "convert it, or remove it") from None
    except Exception as exc:  # Parsers of damaged headers, too.
        raise _damaged(where, exc) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        problem = f"has {width}x{height} pixels, the most is {MAX_PIXELS}"
        raise BadData("E-IMG-004", where, problem, "scale it down")
    if min(width, height) < MIN_SIDE:
        problem = f"has {width}x{height} pixels, the least is {MIN_SIDE} a side"
        raise BadData("E-IMG-006", where, problem, "use a larger one")
    return image


def _damaged(where: str, exc: Exception) -> BadData:
    reason = (str(exc).split("\n")[0] or type(exc).__name__)[:120]
    return BadData("E-IMG-005", where, f"is damaged ({reason})", "export it again, or remove it")


def _is_plain(content: bytes, image: Image.Image) -> bool:
    """Whether the pixels are 8-bit sRGB or grey, opaque, upright and alone, as far as the header tells."""
    return (
        image.mode in {"RGB", "L"}
        and (image.format in {"JPEG", "WEBP"} or (image.format == "PNG" and _is_plain_png(content, image)))
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and _is_srgb(image.info.get("icc_profile"))
        and (image.format == "PNG" or _orientation(image) not in _UPRIGHT)
    )


def _is_plain_png(content: bytes, image: Image.Image) -> bool:
    """Whether a PNG is of moderate size and says nothing of its orientation. That may stand behind the pixels, and
    Pillow would decode them all to find it."""
    small = image.width * image.height <= COPIED_PIXELS
    return small and not any(chunk.startswith(_PNG_EXIF) for chunk in _png_chunks(content))


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """Type and first bytes of each chunk, without a look at the rest."""
    place = 8
    while place + 8 <= len(content):
        yield content[place + 4 : place + 32]
        place += 12 + int.from_bytes(content[place : place + 4], "big")


def _is_srgb(profile: bytes | None) -> bool:
    """Whether a colour profile, or its absence, leaves the values as they are."""
    if not profile:
        return True
    try:
        return ImageCms.getProfileDescription(io.BytesIO(profile)).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError):
        return True  # An unusable profile leaves the usual reading, sRGB.


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Unreadable EXIF says nothing about the pixels.
        return 1


def _turned(size: Size, turn: Image.Transpose | None) -> Size:
    sideways = turn is not None and turn.name not in {"FLIP_LEFT_RIGHT", "FLIP_TOP_BOTTOM", "ROTATE_180"}
    return size[::-1] if sideways else size


def _cut(size: Size, framing: Framing) -> Cut:
    width, height = size
    if framing.fit == "pad":
        scale = framing.resolution / max(size)
        return Cut(0, 0, width, height, (max(1, round(width * scale)), max(1, round(height * scale))))
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return Cut(left, top, left + side, top + side, (framing.resolution, framing.resolution))


def _padded(pixels: Pixels, framing: Framing) -> Pixels:
    """Pixels in the middle of a square of the background colour: uint8 [R, R, 3]."""
    height, width, _ = pixels.shape
    if height == width:
        return pixels
    square = np.full((framing.resolution, framing.resolution, 3), framing.background, np.uint8)
    top, left = (framing.resolution - height) // 2, (framing.resolution - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


# --- The quick way.


def _quick(content: bytes, image: Image.Image, framing: Framing) -> Pixels | None:
    """A plain file by torch's kernels: uint8 [H, W, 3], not yet padded. None where they cannot, or differ."""
    import torch
    from torch.nn.functional import interpolate
    from torchvision.io import decode_image

    if image.format == "PNG":  # torchvision 0.29 ends its process on nearly every damaged one.
        found = _plain_png(content, image)
        if found is None:
            return None
        whole = torch.from_numpy(found).permute(2, 0, 1)
    else:
        try:
            whole = decode_image(torch.frombuffer(content, dtype=torch.uint8))
        except RuntimeError as exc:
            if "memory" in str(exc) or "bad_alloc" in str(exc):
                raise MemoryError from None
            return None
    if whole.dtype != torch.uint8 or whole.shape != (len(image.getbands()), image.height, image.width):
        return None
    left, top, right, bottom, (width, height) = _cut(image.size, framing)
    part = whole[None, :, top:bottom, left:right]
    (small,) = interpolate(part, (height, width), mode="bicubic", antialias=True)
    pixels: Pixels = small.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return pixels


def _plain_png(content: bytes, image: Image.Image) -> Pixels | None:
    """An 8-bit PNG by a decoder in Rust, thrice as fast as libpng: uint8 [H, W, 1 or 3]. None where it objects."""
    from kornia_rs.io import decode_image_png_u8

    try:
        pixels: Pixels = decode_image_png_u8(
            content, image.size[::-1], "rgb" if image.mode == "RGB" else "mono"
        )
    except Exception:  # It raises nothing more special; Pillow then says whether the file is damaged.
        return None
    return pixels


# --- The thorough way.


def _thorough(image: Image.Image, turn: Image.Transpose | None, framing: Framing) -> Pixels:
    """A loaded picture of any kind by Pillow: uint8 [H, W, 3], upright, not yet padded."""
    profile = image.info.get("icc_profile")
    image = _continuous(image)
    grey = image.mode.startswith(("I", "F"))
    extrema = cast(tuple[float, float], image.getextrema()) if grey else None
    image = _resampled(image, _cut(image.size, framing))
    if turn is not None:
        image = image.transpose(turn)
    if extrema is not None:
        image = Image.fromarray(scale_to_bytes(np.asarray(image), extrema))
    return np.asarray(_flat(image, profile, framing.background), np.uint8)


def _continuous(image: Image.Image) -> Image.Image:
    """The same picture in a mode that can be resampled: neither a palette nor bits nor foreign bytes."""
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode == "P":
        return image.convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image


def _resampled(image: Image.Image, cut: Cut) -> Image.Image:
    *box, size = cut
    if box != [0, 0, *image.size]:
        # Cropped first: given a box, Pillow lets pixels from outside of it shine in.
        whole, image = image, image.crop(cut[:4])
        whole.close()  # Frees its pixels, which somebody else may still hold.
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _flat(image: Image.Image, profile: bytes | None, background: Sequence[int]) -> Image.Image:
    """In sRGB, on the background: an alpha channel is composited, so that hidden colours stay hidden."""
    if image.mode != "RGBA":
        return _to_srgb(image, profile)
    canvas = Image.new("RGB", image.size, (background[0], background[1], background[2]))
    canvas.paste(_to_srgb(image.convert("RGB"), profile), mask=image.getchannel("A"))
    return canvas


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    plain = image if image.mode in {"RGB", "CMYK", "L", "LAB"} else image.convert("RGB")
    if profile and not _is_srgb(profile):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(plain, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None  # A profile of another kind of picture: again, the usual reading.
        if converted is not None:
            return converted
    return plain.convert("RGB")


def scale_to_bytes(values: NDArray[np.generic], extrema: tuple[float, float] | None = None) -> Pixels:
    """Grey values of 16-bit or float images as uint8, scaled rather than clipped.

    uint16 counts as 0-65535, and so do wider integers unless all are below 256. Floats count as 0-1
    or, where they go beyond, as 0-255. Raises ValueError for negative, larger and non-finite values.

    Args:
        values: any shape.
        extrema: least and greatest value before resampling, to which overshoots are clipped.
    """
    low, high = extrema or (float(values.min()), float(values.max()))
    if np.issubdtype(values.dtype, np.integer):
        full = 65535.0 if values.dtype == np.uint16 or high > 255 else 255.0
    else:
        full = 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= full and np.isfinite(values).all()):
        raise ValueError(f"its values run from {low:g} to {high:g}")
    scaled = np.clip(values.astype(np.float64), low, high) * (255 / full)
    return np.rint(scaled).astype(np.uint8)


def box_mean(pixels: Pixels, factor: int) -> Pixels:
    """Mean of every `factor` x `factor` box: uint8 [H, W, 3] to uint8 [H/factor, W/factor, 3]."""
    height, width, channels = pixels.shape
    boxes = pixels.reshape(height // factor, factor, width // factor, factor, channels)
    means: Pixels = np.rint(boxes.mean((1, 3), dtype=np.float64)).astype(np.uint8)
    return means


def tile(pictures: Sequence[Pixels], columns: int, gap: int = 2) -> Pixels:
    """Pictures of one size in rows of `columns`, `gap` px of light grey between them: uint8 [H, W, 3]."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, 224, np.uint8)
    for number, picture in enumerate(pictures):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet
