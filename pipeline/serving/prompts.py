"""Encoded prompts, kept: most requests are for more images of a prompt that was there before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.text.encoder import Encoded, TextEncoder

CAPACITY = 256  # prompts; of CLIP they take 60 MB


class CachedEncoder:
    """A `TextEncoder` that keeps the vectors of the last prompts. They are the same, bit for bit, since those of an
    encoder do not depend on the other prompts of a call. For one thread."""

    def __init__(self, encoder: TextEncoder, capacity: int = CAPACITY) -> None:
        self._encoder = encoder
        self._capacity = capacity
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    @property
    def info(self) -> dict[str, Any]:
        """See `TextEncoder.info`."""
        return self._encoder.info

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """See `TextEncoder.count_tokens`."""
        return self._encoder.count_tokens(captions)

    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `TextEncoder.encode`; prompts that are not kept are encoded in one call."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        if missing:
            rows = zip(*self._encoder.encode(missing), strict=True)
            self._kept.update(zip(missing, rows, strict=True))
        for caption in captions:
            self._kept.move_to_end(caption)
        pooled, tokens, mask = zip(*(self._kept[caption] for caption in captions), strict=True)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return np.stack(pooled), np.stack(tokens), np.stack(mask)
