"""Decoding by Pillow: orientation, colour profiles, exact scaling to 8 bits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pipeline.prepare.framing import CropBox, Framing, Pixels, Size, crop_box

_ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_srgb(profile: bytes | None) -> bool:
    """Whether a colour profile, or its absence, leaves the values as they are."""
    if not profile:
        return True
    try:
        return ImageCms.getProfileDescription(io.BytesIO(profile)).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError):
        return True  # An unusable profile leaves the usual reading, sRGB.


def orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Unreadable EXIF says nothing about the pixels.
        return 1


def is_sideways(turn: Image.Transpose | None) -> bool:
    """Whether a turn swaps width and height."""
    return turn is not None and turn.name not in {"FLIP_LEFT_RIGHT", "FLIP_TOP_BOTTOM", "ROTATE_180"}


def turned_size(size: Size, turn: Image.Transpose | None) -> Size:
    return size[::-1] if is_sideways(turn) else size


def decode_with_pillow(image: Image.Image, turn: Image.Transpose | None, framing: Framing) -> Pixels:
    """A loaded image of any kind by Pillow: uint8 [H, W, 3], upright, not yet padded."""
    profile = image.info.get("icc_profile")
    image = to_resamplable(image)
    grey = image.mode.startswith(("I", "F"))
    extrema = cast(tuple[float, float], image.getextrema()) if grey else None
    image = _resampled(image, crop_box(image.size, framing.turned() if is_sideways(turn) else framing))
    if turn is not None:
        image = image.transpose(turn)
    if extrema is not None:
        image = Image.fromarray(scale_to_bytes(np.asarray(image), extrema))
    return np.asarray(flatten(image, profile, framing.background), np.uint8)


def to_resamplable(image: Image.Image) -> Image.Image:
    """The same image in a mode that can be resampled: neither a palette nor bits nor foreign bytes."""
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode == "P":
        return image.convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image


def _resampled(image: Image.Image, cut: CropBox) -> Image.Image:
    *box, size = cut
    if box != [0, 0, *image.size]:
        # Cropped first: given a box, Pillow lets pixels from outside of it shine in.
        whole, image = image, image.crop(cut[:4])
        whole.close()  # frees its pixels even if a reference remains
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def flatten(image: Image.Image, profile: bytes | None, background: Sequence[int]) -> Image.Image:
    """In sRGB, on the background: an alpha channel is composited, so that hidden colours stay hidden."""
    if image.mode != "RGBA":
        return _to_srgb(image, profile)
    canvas = Image.new("RGB", image.size, (background[0], background[1], background[2]))
    canvas.paste(_to_srgb(image.convert("RGB"), profile), mask=image.getchannel("A"))
    return canvas


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    plain = image if image.mode in {"RGB", "CMYK", "L", "LAB"} else image.convert("RGB")
    if profile and not is_srgb(profile):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(plain, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None  # A profile of another kind of image: again, the usual reading.
        if converted is not None:
            return converted
    return plain.convert("RGB")


def scale_to_bytes(values: NDArray[np.generic], extrema: tuple[float, float] | None = None) -> Pixels:
    """Grey values of 16-bit or float images as uint8, scaled rather than clipped.

    uint16 counts as 0-65535, and so do wider integers unless all are below 256. Floats count as 0-1
    or, where they go beyond, as 0-255. Raises ValueError for negative, larger and non-finite values.

    Args:
        values: any shape.
        extrema: minimum and maximum before resampling, to which overshoots are clipped.
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
