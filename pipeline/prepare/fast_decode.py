"""Decoding plain PNG and JPEG files by kornia-rs, with the same pixels as by Pillow."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from pipeline.prepare.framing import Framing, Pixels, crop_box
from pipeline.prepare.pillow import UPRIGHT, is_srgb, orientation

COPIED_PIXELS = 2**24  # of a PNG; the copies of a larger one would not fit into a decoder's memory
# How chunks begin that may hold an orientation.
_PNG_EXIF = (b"eXIf", b"tEXtRaw profile type", b"zTXtRaw profile type", b"iTXtXML:com.adobe.xmp")


def is_plain(content: bytes, image: Image.Image) -> bool:
    """Whether the pixels are 8-bit sRGB or grey, opaque, upright and not animated, according to the header."""
    return (
        image.mode in {"RGB", "L"}
        and (image.format in {"JPEG", "WEBP"} or (image.format == "PNG" and _is_plain_png(content, image)))
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and is_srgb(image.info.get("icc_profile"))
        and (image.format == "PNG" or orientation(image) not in UPRIGHT)
    )


def _is_plain_png(content: bytes, image: Image.Image) -> bool:
    """Whether a PNG is of moderate size and has no orientation. That may come after the pixels, and
    Pillow would decode them all to find it."""
    small = image.width * image.height <= COPIED_PIXELS
    return small and not any(chunk.startswith(_PNG_EXIF) for chunk in _png_chunks(content))


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """Type and first bytes of each chunk, without reading the rest."""
    place = 8
    while place + 8 <= len(content):
        yield content[place + 4 : place + 32]
        place += 12 + int.from_bytes(content[place : place + 4], "big")


def decode_fast(content: bytes, image: Image.Image, framing: Framing) -> Pixels | None:
    """A plain file by torch's kernels: uint8 [H, W, 3], not yet padded. None where they cannot, or differ."""
    import torch
    from torch.nn.functional import interpolate
    from torchvision.io import decode_image

    if image.format == "PNG":  # torchvision 0.29 ends its process on nearly every damaged one.
        decoded = _plain_png(content, image)
        if decoded is None:
            return None
        whole = torch.from_numpy(decoded).permute(2, 0, 1)
    else:
        try:
            whole = decode_image(torch.frombuffer(content, dtype=torch.uint8))
        except RuntimeError as exc:
            if "memory" in str(exc) or "bad_alloc" in str(exc):
                raise MemoryError from None
            return None
    if whole.dtype != torch.uint8 or whole.shape != (len(image.getbands()), image.height, image.width):
        return None
    left, top, right, bottom, (width, height) = crop_box(image.size, framing)
    part = whole[None, :, top:bottom, left:right]
    (small,) = interpolate(part, (height, width), mode="bicubic", antialias=True)
    pixels: Pixels = small.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return pixels


def _plain_png(content: bytes, image: Image.Image) -> Pixels | None:
    """An 8-bit PNG by a decoder in Rust, three times as fast as libpng: uint8 [H, W, 1 or 3]. None if it fails."""
    from kornia_rs.io import decode_image_png_u8

    try:
        pixels: Pixels = decode_image_png_u8(
            content, image.size[::-1], "rgb" if image.mode == "RGB" else "mono"
        )
    except Exception:  # It raises nothing more special; Pillow then says whether the file is damaged.
        return None
    return pixels
