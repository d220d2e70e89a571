"""From a file's bytes to a square of pixels: decode, crop or pad, resample, turn upright, convert, flatten.

Safe on untrusted files: formats are an allowlist, sizes are checked before pixels are decoded, and every fault is a
`BadData` with an E-IMG code. Plain files are decoded by torchvision and kornia-rs, HEIC and JPEG XL by plug-ins
(photos.py), all others by Pillow, which is slower; the ways agree within rounding. Images are uint8, height x width
x 3, in sRGB; of several in a file, the first or primary one. decoder.py protects against files that crash their
process.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import BadData
from pipeline.prepare import photos
from pipeline.prepare.fast_decode import decode_fast, is_plain
from pipeline.prepare.framing import DecodedImage, Framing, Pixels, pad
from pipeline.prepare.limits import USUAL, Limits, too_many_bytes
from pipeline.prepare.pillow import (
    UPRIGHT,
    decode_with_pillow,
    flatten,
    orientation,
    scale_to_bytes,
    to_resamplable,
    turned_size,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MIN_SIDE = 8
_SMALLER = "scale it down, or raise data.max_pixels"


def decode_square(content: bytes, where: str, framing: Framing) -> DecodedImage:
    """Decode an image file, completely, and make it a square.

    Resampling is bicubic, antialiased where it shrinks, on the file's own values (palettes expanded).

    Args:
        content: the bytes of the file.
        where: its name, for messages.
        framing: resolution, fit and background, and the limits of the file.

    Raises:
        BadData: E-IMG-001 empty, 002 too many bytes, 003 no accepted format, 004 too many pixels, 005 damaged,
            006 too small, 015 no plug-in, 016 a raw camera file, 017 high dynamic range, 018 animated JPEG XL.
        MemoryError: this process may not have as much as decoding needs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in files that decode all the same.
        image, content = _open(content, where, framing.limits)
        mode, size, several = image.mode, image.size, bool(getattr(image, "is_animated", False))
        try:
            pixels = decode_fast(content, image, framing) if is_plain(content, image) else None
            if pixels is None:
                image.load()
                turn = UPRIGHT.get(orientation(image))  # of a TIFF, Pillow has turned pixels and size itself
                size = turned_size(image.size, turn)
                pixels = decode_with_pillow(image, turn, framing)
            return DecodedImage(pad(pixels, framing), *size, mode, int(pixels.max()), several)
        except MemoryError:
            raise
        except Exception as exc:  # Decoders of damaged bytes raise whatever they meet.
            raise _damaged(where, exc) from None


def decode_full_size(content: bytes, where: str, limits: Limits = USUAL) -> tuple[Pixels, Pixels | None]:
    """Decode an image file at its own size, upright: (sRGB [H,W,3], alpha [H,W], or None where all is opaque).

    What shines through is composited on white. Raises as `decode_square` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, _ = _open(content, where, limits)
        try:
            image.load()
            turn, profile = UPRIGHT.get(orientation(image)), image.info.get("icc_profile")
            image = to_resamplable(image)
            if turn is not None:
                image = image.transpose(turn)
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(scale_to_bytes(np.asarray(image)))
            alpha = np.array(image.getchannel("A"), np.uint8) if image.mode == "RGBA" else None
            pixels = np.array(flatten(image, profile, (255, 255, 255)), np.uint8)
        except MemoryError:
            raise
        except Exception as exc:  # As in `decode_square`.
            raise _damaged(where, exc) from None
    return pixels, alpha if alpha is not None and alpha.min() < 255 else None


def with_alpha(pixels: Pixels, alpha: Pixels) -> Pixels:
    """An enlarged image on white [fH,fW,3] with the transparency [H,W] it once had, enlarged by bicubic
    interpolation: [fH,fW,4], which on white is `pixels` again where it can be."""
    height, width, _ = pixels.shape
    enlarged = np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC))
    result = np.empty((height, width, 4), np.uint8)
    result[..., 3] = enlarged
    for top in range(0, height, 256):  # few rows at a time: floats are large
        rows = slice(top, top + 256)
        opacity = np.maximum(enlarged[rows, :, None].astype(np.float32), 1) / 255
        colours = 255 - (255 - pixels[rows].astype(np.float32)) / opacity
        result[rows, :, :3] = np.rint(np.clip(colours, 0, 255))
    return result


def check_bytes(content: bytes, where: str, limits: Limits) -> None:
    """Raises BadData E-IMG-001 where a file is empty, E-IMG-002 where it has too many bytes."""
    if not content:
        raise BadData("E-IMG-001", where, "is empty", "export it again, or remove it")
    if len(content) > limits.max_bytes:
        raise too_many_bytes(where, len(content), limits.max_bytes)


def _open(content: bytes, where: str, limits: Limits) -> tuple[Image.Image, bytes]:
    """The file with its header read and its size accepted, and its bytes. No pixel is decoded, except of JPEG XL.

    A JPEG file that was made smaller as JPEG XL comes back as what it was.
    """
    check_bytes(content, where, limits)
    kind = photos.kind_of(content)
    if kind:
        photos.check_plugin(kind, where)
    try:
        if kind == "JPEG XL":
            image, content = _open_jxl(content, where, limits)
        elif kind:
            image = photos.open_heic(content, where)
        else:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (MemoryError, BadData):
        raise
    except Image.DecompressionBombError:
        problem = f"has more than {limits.max_pixels} pixels"
        raise BadData("E-IMG-004", where, problem, _SMALLER) from None
    except UnidentifiedImageError:
        if kind:
            raise _damaged(where, ValueError("its header cannot be read")) from None
        problem = f"is none of {', '.join((*FORMATS, *photos.PLUGINS))}"
        raise BadData("E-IMG-003", where, problem, "convert it, or remove it") from None
    except Exception as exc:  # Parsers of damaged headers, too.
        raise _damaged(where, exc) from None
    if photos.is_raw(image):
        raise photos.raw_file(where, "DNG, NEF or the like")
    _check_size(*image.size, where, limits)
    return image, content


def _open_jxl(content: bytes, where: str, limits: Limits) -> tuple[Image.Image, bytes]:
    """As `_open`, for JPEG XL. Raises BadData E-IMG-018 for animations: the decoder gives their last frame."""
    header = photos.read_jxl_header(content)
    _check_size(header.width, header.height, where, limits)
    if header.animated:
        raise BadData("E-IMG-018", where, "is an animated JPEG XL", "export its first frame as PNG")
    decoded = photos.decode_jxl(content)
    if isinstance(decoded, Image.Image):
        return decoded, content
    return Image.open(io.BytesIO(decoded), formats=("JPEG",)), decoded


def _check_size(width: int, height: int, where: str, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        problem = f"has {width}x{height} pixels, the limit is {limits.max_pixels}"
        raise BadData("E-IMG-004", where, problem, _SMALLER)
    if min(width, height) < MIN_SIDE:
        problem = f"has {width}x{height} pixels, the minimum is {MIN_SIDE} a side"
        raise BadData("E-IMG-006", where, problem, "use a larger one")


def _damaged(where: str, exc: Exception) -> BadData | MemoryError:
    if photos.is_want_of_memory(exc):
        return MemoryError()
    reason = (str(exc).split("\n")[0] or type(exc).__name__)[:120]
    return BadData("E-IMG-005", where, f"is damaged ({reason})", "export it again, or remove it")
