"""What a text encoder does, and how captions go through one in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Encoded = tuple[Float32, Float32, NDArray[np.bool_]]
Halves = tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.bool_]]
SETTING = "data.text_encoder"
BATCH_SIZE = 64  # captions that pass through an encoder together, at most
# Kernels round by the shape of their batch, but alike from some 60 tokens on: MKL's for AMD and Intel processors,
# with AVX512, AVX2 and SSE, on one thread and two. Smaller batches are filled up to this many tokens, and to fours.
TOKENS, FILL = 128, 4


class TextEncoder(Protocol):
    """Turns captions into vectors.

    `info` holds what identifies the encoder, and is enough to build it again (`encoder_of`): name, sha256 of
    its weights, dim, max_tokens.
    """

    @property
    def info(self) -> dict[str, Any]:
        """What identifies the encoder, as JSON values."""
        ...

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Encode `captions`.

        Returns:
            pooled float32 [n, dim] of unit length, tokens float32 [n, max_tokens, dim], zero where
            masked, and mask bool [n, max_tokens]. An empty caption has an all-False mask and zeros.
        """
        ...

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any are cut."""
        ...


def encode_batches(
    captions: Sequence[str], max_tokens: int, dim: int, encode_batch: Callable[[list[str]], Encoded]
) -> Encoded:
    """`TextEncoder.encode` in batches that are filled up: vectors do not depend on the number of captions."""
    pooled = np.zeros((len(captions), dim), np.float32)
    tokens = np.zeros((len(captions), max_tokens, dim), np.float32)
    mask = np.zeros((len(captions), max_tokens), np.bool_)
    present = [i for i, caption in enumerate(captions) if caption.strip()]
    for start in range(0, len(present), BATCH_SIZE):
        rows = present[start : start + BATCH_SIZE]
        size = min(BATCH_SIZE, max(len(rows) + -len(rows) % FILL, TOKENS // max_tokens))
        batch = encode_batch([captions[i] for i in rows] + [""] * (size - len(rows)))
        pooled[rows], tokens[rows], mask[rows] = (array[: len(rows)] for array in batch)
    return pooled, tokens, mask
