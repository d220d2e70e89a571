"""From a file's bytes to a square of pixels: decode, orient, colour-convert, flatten, crop, resample.

Pure functions on bytes and arrays, safe on files that nobody has looked at: formats are an allowlist,
sizes are checked before pixels are decoded, and whatever is wrong is a `BadData` with an E-IMG code.
Pictures are uint8, height x width x 3, in sRGB; of an animation, the first frame.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.errors import BadData

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
MIN_SIDE = 8

Pixels = NDArray[np.uint8]


def decode(content: bytes, where: str, background: Sequence[int]) -> Pixels:
    """Decode an image file, completely.

    Args:
        content: the bytes of the file.
        where: its name, for messages.
        background: red, green, blue (0-255) put behind transparent pixels.

    Returns:
        uint8 [H, W, 3], turned as its EXIF orientation says.

    Raises:
        BadData: E-IMG-001 empty, 002 too many bytes, 003 no accepted format, 004 too many pixels,
            005 damaged, 006 too small.
    """
    if not content:
        raise BadData("E-IMG-001", where, "is empty", "export it again, or remove it")
    if len(content) > MAX_BYTES:
        problem = f"has {len(content)} bytes, the most is {MAX_BYTES}"
        raise BadData("E-IMG-002", where, problem, "scale it down")
    damaged = "export it again, or remove it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in files that decode all the same.
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            problem = f"has more than {MAX_PIXELS} pixels"
            raise BadData("E-IMG-004", where, problem, "scale it down") from None
        except UnidentifiedImageError:
            problem = f"is none of {', '.join(FORMATS)}"
            raise BadData("E-IMG-003", where, problem, "convert it, or remove it") from None
        except Exception as exc:  # Decoders of damaged bytes raise whatever they meet.
            raise BadData("E-IMG-005", where, f"is damaged ({_reason(exc)})", damaged) from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            problem = f"has {width}x{height} pixels, the most is {MAX_PIXELS}"
            raise BadData("E-IMG-004", where, problem, "scale it down")
        if min(width, height) < MIN_SIDE:
            problem = f"has {width}x{height} pixels, the least is {MIN_SIDE} a side"
            raise BadData("E-IMG-006", where, problem, "use a larger one")
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_to_rgb(upright, background), np.uint8)
        except Exception as exc:
            raise BadData("E-IMG-005", where, f"is damaged ({_reason(exc)})", damaged) from None


def _reason(exc: Exception) -> str:
    return (str(exc).split("\n")[0] or type(exc).__name__)[:120]


def _to_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(scale_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        # Composited: a plain conversion would show the colours hidden under transparent pixels.
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return _to_srgb(image)


def scale_to_bytes(values: NDArray[np.generic]) -> Pixels:
    """Grey values of 16-bit or float images as uint8, scaled rather than clipped.

    uint16 counts as 0-65535, and so do wider integers unless all are below 256. Floats count as 0-1
    or, where they go beyond, as 0-255. Raises ValueError for negative, larger and non-finite values.
    """
    array = values.astype(np.float64)
    low, high = float(array.min()), float(array.max())
    integer = np.issubdtype(values.dtype, np.integer)
    if integer:
        full = 65535.0 if values.dtype == np.uint16 or high > 255 else 255.0
    else:
        full = 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= full):
        raise ValueError(f"its values run from {low:g} to {high:g}")
    scaled: Pixels = np.rint(array * (255 / full)).astype(np.uint8)
    return scaled


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    plain = image if image.mode in {"RGB", "CMYK", "L", "LAB"} else image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            return plain.convert("RGB")  # An unusable profile leaves the usual reading, sRGB.
        if converted is not None:
            return converted
    return plain.convert("RGB")


def square(pixels: Pixels, resolution: int) -> Pixels:
    """The largest centred square, resampled (bicubic, antialiased) to `resolution`: uint8 [R, R, 3]."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = pixels[top : top + side, left : left + side]
    if side == resolution:
        return crop
    image = Image.fromarray(crop).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


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
