"""Photographs of phones and cameras: HEIC and JPEG XL by the plug-ins of the extra `photos`, and raw files.

Raw files are recognised and refused: a sensor's values are no picture before somebody has developed them, and
the picture that most raw files have at their beginning is a thumbnail.
"""

from __future__ import annotations

import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from pipeline.errors import BadData

PLUGINS = {"HEIC": "pillow_heif", "JPEG XL": "pillow_jxl"}  # modules, by the kind of file that they decode
LIBRARIES = ("pillow-heif", "pillow-jxl-plugin")
INSTALL = "pip install 'crescendo[photos]'"
NO_PLUGIN = "E-IMG-015"
RAW = "E-IMG-016"
RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # brands, ISO/IEC 23008-12
_JXL_BARE, _JXL_BOXED = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_SUBFILE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706  # tags of TIFF
_REDUCED = 1  # a value of the first
_HDR = {16, 18}  # transfer characteristics, ITU-T H.273: PQ, HLG


def kind_of(content: bytes) -> str:
    """HEIC, JPEG XL or, for anything else, an empty text: what a file's first bytes say."""
    if content.startswith((_JXL_BARE, _JXL_BOXED)):
        return "JPEG XL"
    if content[4:8] == b"ftyp":
        brands = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
        if {brands[i : i + 4] for i in range(0, len(brands), 4)} & _HEIC and brands[:4] not in {
            b"avif",
            b"avis",
        }:
            return "HEIC"
    return ""


def plugin(kind: str) -> Any:
    """The module that decodes a kind of file, ready for use; None where it is not installed."""
    try:
        if kind == "JPEG XL":
            import pillow_jxl

            return pillow_jxl
        import pillow_heif
    except ImportError:
        return None
    # Threads would count against the limits of a decoder, and nothing but the picture is wanted.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return pillow_heif


def check_plugin(kind: str, where: str) -> None:
    """Raises BadData E-IMG-015 where the plug-in for a kind of file is not installed."""
    if plugin(kind) is None:
        raise BadData(
            NO_PLUGIN, where, f"is {kind}, which needs the extra photos", f"{INSTALL}, or export it as JPEG"
        )


# --- HEIC.


def open_heic(content: bytes, where: str) -> Image.Image:
    """The primary image of a HEIC file, not yet decoded; decoding turns it upright.

    Raises BadData E-IMG-017 for high dynamic range, whose brightness sRGB cannot hold.
    """
    image = Image.open(io.BytesIO(content), formats=("HEIF",))
    profile = image.info.get("nclx_profile") or {}
    if "icc_profile" not in image.info and profile.get("transfer_characteristics") in _HDR:
        problem = "is a picture of high dynamic range (PQ or HLG)"
        raise BadData("E-IMG-017", where, problem, "export it as JPEG, in standard dynamic range")
    return image


def is_want_of_memory(exc: Exception) -> bool:
    """Whether HEIC's decoder says so; that of JPEG XL calls everything a generic error."""
    return str(exc).startswith("Memory allocation error")


# --- JPEG XL.


class JxlHeader(NamedTuple):
    """What the beginning of a JPEG XL file says."""

    width: int  # px
    height: int
    animated: bool


class _Bits:
    """Reads fields of a JPEG XL codestream, least significant bit first (ISO/IEC 18181-1, annex B)."""

    def __init__(self, content: bytes) -> None:
        self._bits, self._left = int.from_bytes(content, "little"), 8 * len(content)

    def take(self, count: int) -> int:
        """The next `count` bits. Raises ValueError at the end."""
        if count > self._left:
            raise ValueError("its header is cut off")
        value = self._bits & ((1 << count) - 1)
        self._bits >>= count
        self._left -= count
        return value


def read_jxl_header(content: bytes) -> JxlHeader:
    """Size and kind of a JPEG XL file, without decoding it. Raises ValueError for a damaged one."""
    bits = _Bits(_codestream(content)[2:64])
    width, height = _size(bits)
    if bits.take(1) or not bits.take(1):  # All metadata have their defaults, or at least those below.
        return JxlHeader(width, height, animated=False)
    bits.take(3)  # orientation, which the decoder applies
    if bits.take(1):  # the size that it is meant to be shown at
        _size(bits)
    if bits.take(1):
        raise ValueError("it has a preview")  # of which no encoder knows
    return JxlHeader(width, height, animated=bool(bits.take(1)))


def _size(bits: _Bits) -> tuple[int, int]:
    """A SizeHeader: (width, height)."""
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    if ratio == 0:
        return _side(bits, small), height
    over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * over // under, height


def _side(bits: _Bits, small: int) -> int:
    return 8 * (bits.take(5) + 1) if small else 1 + bits.take((9, 13, 18, 30)[bits.take(2)])


def _codestream(content: bytes) -> bytes:
    """The beginning of the codestream of a file, bare or in boxes."""
    if content.startswith(_JXL_BARE):
        return content[:64]
    place = 0
    while place + 8 <= len(content):
        size, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        start = place + 8
        if size == 1:
            size, start = int.from_bytes(content[place + 8 : place + 16], "big"), place + 16
        if name in {b"jxlc", b"jxlp"}:
            start += 4 if name == b"jxlp" else 0  # its number
            return content[start : start + 64]
        if size < 8:
            break
        place += size
    raise ValueError("it has no codestream")


def decode_jxl(content: bytes) -> Image.Image | bytes:
    """The pixels of a JPEG XL file, upright; or the bytes of the JPEG file that it was made from without loss.

    Raises ValueError for a damaged file. The plug-in's own class for Pillow decodes before it tells the size, with
    threads, and leaves an orientation in EXIF that the decoder has applied (ISO/IEC 18181-2 has it ignored).
    """
    try:
        is_jpeg, header, data, profile, _ = plugin("JPEG XL").Decoder(num_threads=0)(content)
    except Exception as exc:
        raise ValueError("it cannot be decoded") from exc
    if is_jpeg:
        return bytes(data)
    image = Image.frombytes(header.mode, (header.width, header.height), data)
    if profile:
        image.info["icc_profile"] = bytes(profile)
    return image


# --- Raw files.


def raw_file(where: str, kind: str) -> BadData:
    """What is wrong with a raw camera file."""
    fix = "develop it, and export it as TIFF or JPEG"
    return BadData(RAW, where, f"is a raw camera file ({kind})", fix)


def is_raw_name(name: str) -> bool:
    return suffix_of(name) in RAW_SUFFIXES


def raw_twins(names: Iterable[str]) -> set[str]:
    """The raw files among images that a camera has written as a picture, too: `IMG_1.CR2` beside `IMG_1.JPG`."""
    listed = list(names)
    raw = [name for name in listed if is_raw_name(name)]
    pictures = {_stem(name) for name in listed if not is_raw_name(name)} if raw else set()
    return {name for name in raw if _stem(name) in pictures}


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0].lower()


def is_raw(image: Image.Image) -> bool:
    """Whether what Pillow takes for a TIFF is a raw file, of which it would read the thumbnail."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return _DNG_VERSION in tags or (tags.get(_SUBFILE) == _REDUCED and _SUB_IFDS in tags)


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in small letters, by which files are counted."""
    stem, dot, suffix = name.rpartition("/")[2].lstrip(".").rpartition(".")
    return (dot + suffix).lower() if stem else ""


def raw_in_words(names: Sequence[str]) -> str:
    """How many raw files of which kinds there are, and what to do about them."""
    what = "1 raw camera file is" if len(names) == 1 else f"{len(names)} raw camera files are"
    return f"{what} not used ({counted(names)}); develop and export such files as TIFF or JPEG"


def counted(names: Iterable[str]) -> str:
    """How many files there are of each suffix: `3 .heic, 1 .jxl`."""
    kinds = Counter(suffix_of(name) or "without a suffix" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
