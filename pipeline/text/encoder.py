"""What every text encoder does, and what the transformers among them share."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Encoded = tuple[Float32, Float32, NDArray[np.bool_]]
Halves = tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.bool_]]
_SETTING = "data.text_encoder"
_BATCH = 64
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


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


def _in_batches(
    captions: Sequence[str], max_tokens: int, dim: int, encode_batch: Callable[[list[str]], Encoded]
) -> Encoded:
    """`TextEncoder.encode` by batches of one size: vectors do not depend on how many there are."""
    pooled = np.zeros((len(captions), dim), np.float32)
    tokens = np.zeros((len(captions), max_tokens, dim), np.float32)
    mask = np.zeros((len(captions), max_tokens), np.bool_)
    present = [i for i, caption in enumerate(captions) if caption.strip()]
    for start in range(0, len(present), _BATCH):
        rows = present[start : start + _BATCH]
        batch = encode_batch([captions[i] for i in rows] + [""] * (_BATCH - len(rows)))
        pooled[rows], tokens[rows], mask[rows] = (array[: len(rows)] for array in batch)
    return pooled, tokens, mask


def _tokenize(tokenizer: Any, texts: list[str], max_tokens: int) -> Any:
    """Padded to `max_tokens` always; what is beyond is cut, the markers of begin and end are kept."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")


def _count_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]] if captions else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' reports on loading, and its progress bars, off the terminal."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
