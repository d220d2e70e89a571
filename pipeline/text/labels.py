"""One-hot vectors over a data set's own captions, for data whose captions are names of classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import artifacts
from pipeline.errors import ConfigError
from pipeline.text.encoder import SETTING, Encoded

MIN_LABELS, MAX_LABELS = 8, 4096


class Labels:
    """One-hot vectors over a closed list of captions. A caption is one token, whatever `data.max_tokens`.

    `info["labels"]` is the list, sorted, so that a snapshot's config.json is enough to encode.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        """`captions` may repeat. Raises ConfigError where they are too many to be names of classes."""
        self.labels = sorted({caption for caption in captions if caption.strip()})
        if len(self.labels) > MAX_LABELS:
            problem = f"'label' has {len(self.labels)} different captions, the limit is {MAX_LABELS}"
            raise ConfigError("E-CFG-014", SETTING, problem, "use 'minilm', which reads any text")
        self.dim = max(len(self.labels), MIN_LABELS)
        self._rows = {label: row for row, label in enumerate(self.labels)}

    @property
    def info(self) -> dict[str, Any]:
        """Name, sha256 of the list, dim, max_tokens and the list."""
        sha256 = artifacts.digest(self.labels)
        return {"name": "label", "sha256": sha256, "dim": self.dim, "max_tokens": 1, "labels": self.labels}

    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `TextEncoder.encode`. Raises ConfigError for a caption that is not in the list."""
        pooled = np.zeros((len(captions), self.dim), np.float32)
        mask = np.zeros((len(captions), 1), np.bool_)
        for i, caption in enumerate(captions):
            if caption.strip():
                pooled[i, self._row(caption)] = 1
                mask[i] = True
        return pooled, pooled[:, None].copy(), mask

    def _row(self, caption: str) -> int:
        if caption not in self._rows:
            close = difflib.get_close_matches(caption[:100], self.labels, n=1)
            few = ", ".join(self.labels[:8])
            fix = f"did you mean {close[0]!r}?" if close else f"use a label such as: {few}"
            raise ConfigError(
                "E-CFG-015", "prompt", f"{caption[:100]!r} is not a label of this data set", fix
            )
        return self._rows[caption]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """One each; none for an empty caption."""
        return [int(bool(caption.strip())) for caption in captions]
