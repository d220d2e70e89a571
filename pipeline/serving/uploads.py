"""Uploaded images, decoded in a process that may die (prepare/decoder.py)."""

from __future__ import annotations

import threading
from functools import partial

from pipeline.errors import BadData
from pipeline.prepare.decoder import Decoder
from pipeline.prepare.framing import Pixels
from pipeline.prepare.images import decode_full_size
from pipeline.prepare.limits import Limits
from pipeline.serving.limits import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS

LIMITS = Limits(MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS)
Decoded = tuple[Pixels, Pixels | None]  # sRGB [H,W,3] on white, alpha [H,W]


class Uploads:
    """Decodes one upload at a time. Its process starts with the first, since it takes seconds and memory."""

    def __init__(self) -> None:
        self._decoder: Decoder[Decoded] | None = None
        self._lock = threading.Lock()

    def decode(self, content: bytes) -> Decoded:
        """The pixels of an image file. Raises BadData."""
        with self._lock:
            if self._decoder is None:
                self._decoder = Decoder(partial(decode_full_size, limits=LIMITS), 1, LIMITS)
            (decoded,) = self._decoder.map([(content, "image")])
        if isinstance(decoded, BadData):
            raise decoded
        return decoded

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._decoder is not None:
                self._decoder.__exit__()
