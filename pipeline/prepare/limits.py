"""How large an image file may be, and what its decoder may need for it.

Of the formats that are read, lossless JPEG XL needs the most: 16 bytes and 0.2 us of a core a pixel, 22 bytes with
transparency. HEIC and lossy JPEG XL need 9 bytes and 0.04 us, JPEG 3 bytes and 0.005 us. A file is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.errors import BadData

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
PIXEL_BYTES = 24
PIXEL_SECONDS = 0.25e-6
LEAST_MEGABYTES = 512
LEAST_SECONDS = 2.0


class Limits(NamedTuple):
    """`data.max_bytes` and `data.max_pixels`, and the limits of a decoder that follow from them."""

    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    @property
    def megabytes(self) -> int:
        """Memory that an item may take: MiB."""
        return max((PIXEL_BYTES * self.max_pixels + 2 * self.max_bytes) // 2**20, LEAST_MEGABYTES)

    @property
    def seconds(self) -> float:
        """Processor time that an item may take."""
        return max(PIXEL_SECONDS * self.max_pixels, LEAST_SECONDS)


USUAL = Limits()
TOO_MANY_BYTES = "E-IMG-002"


def too_many_bytes(where: str, size: int, limit: int) -> BadData:
    """What is wrong with a file of more bytes than it may have."""
    problem = f"has {size} bytes, the limit is {limit}"
    return BadData(TOO_MANY_BYTES, where, problem, "scale it down, or raise data.max_bytes")
