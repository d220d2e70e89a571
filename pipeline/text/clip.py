"""The text half of a CLIP model, from a folder or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing
from pipeline.progress import quiet_transformers
from pipeline.text.encoder import SETTING, Encoded, encode_batches

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CLIP_FILES = [
    "model*.safetensors",
    _INDEX,
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
]


class Clip:
    """The text half of a CLIP model in eval mode, float32, on the CPU.

    Tokens are its last hidden states. Pooled is its text embedding, or, where the folder holds no projection
    of the tokens' width, the hidden state of the end marker; either is scaled to unit length.
    """

    def __init__(self, name: str, max_tokens: int) -> None:
        """`name`: a folder, or a repository of the hub.

        Raises:
            InputMissing: there is no such folder or repository, or no CLIP text model in safetensors in it.
            ConfigError: `max_tokens` is more than the model reads.
        """
        folder = _clip_folder(name)
        weights = _clip_weights(folder, name)
        try:
            with quiet_transformers():
                self._tokenizer, self._model, projects = _load_clip(folder)
        except Exception as error:  # The tokenizers library raises nothing narrower.
            raise _no_clip(name, str(error).strip().partition("\n")[0][:200]) from error
        config = self._model.config
        if max_tokens > config.max_position_embeddings:
            problem = f"{max_tokens} is more than the {config.max_position_embeddings} that clip:{name} reads"
            raise ConfigError("E-CFG-013", "data.max_tokens", problem, "lower it")
        self.name = name
        self.sha256 = _digest_of_files(weights)
        self.max_tokens = max_tokens
        self.dim = int(config.hidden_size)
        self._projects = projects and config.projection_dim == config.hidden_size

    @property
    def info(self) -> dict[str, Any]:
        """Name (`clip:...`), sha256 of its safetensors, dim and max_tokens."""
        name = f"clip:{self.name}"
        return {"name": name, "sha256": self.sha256, "dim": self.dim, "max_tokens": self.max_tokens}

    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `TextEncoder.encode`."""
        return encode_batches(captions, self.max_tokens, self.dim, self._encode_batch)

    def _encode_batch(self, texts: list[str]) -> Encoded:
        import torch

        inputs = tokenize(self._tokenizer, texts, self.max_tokens)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode():
            output = self._model.text_model(input_ids=ids, attention_mask=mask)
            pooled = output.pooler_output  # [n, d]
            if self._projects:
                pooled = self._model.text_projection(pooled)
            pooled = torch.nn.functional.normalize(pooled, dim=1)
            hidden = output.last_hidden_state * mask[..., None]  # [n, T, d]
        return pooled.numpy(), hidden.numpy(), mask.bool().numpy()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any are cut, markers included."""
        return _count_tokens(self._tokenizer, captions)


def _clip_folder(name: str) -> Path:
    """The folder `name`, or the hub's repository of that name, downloaded unless it was before."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers():
            return Path(snapshot_download(name, allow_patterns=_CLIP_FILES))
    except (OSError, ValueError) as error:
        problem = (
            f"{name!r} is not a folder and could not be downloaded from the hub ({type(error).__name__})"
        )
        fix = f"download it where there is a network (hf download {name}) and give the folder: clip:FOLDER"
        raise InputMissing("E-INP-027", SETTING, problem, fix) from error


def _clip_weights(folder: Path, name: str) -> list[Path]:
    """The safetensors that transformers will load. Raises InputMissing where a file is missing."""
    if not (folder / "config.json").is_file():
        raise _no_clip(name, "there is no config.json")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise _no_clip(name, "there is no tokenizer.json or vocab.json")
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    try:
        parts = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
        weights = [folder / part for part in sorted(set(parts))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _no_clip(name, f"there is no {_WEIGHTS}; other formats are not read") from None
    for path in weights:
        if not path.is_file():
            raise _no_clip(name, f"there is no {path.name}")
    return weights


def _load_clip(folder: Path) -> tuple[Any, Any, bool]:
    """Tokenizer, model, and whether its files hold a projection. Raises ValueError for another model."""
    import torch
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    only_here = {"local_files_only": True, "use_safetensors": True}
    model, report = CLIPTextModelWithProjection.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **only_here
    )
    missing = set(report["missing_keys"])
    absent = sorted(missing - {"text_projection.weight"})
    if absent:
        raise ValueError(f"{len(absent)} tensors are missing, first: {absent[0]}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"its tokenizer has {len(tokenizer)} words, its model {model.config.vocab_size}")
    return tokenizer, model.eval().requires_grad_(False), not missing


def _no_clip(name: str, reason: str) -> InputMissing:
    fix = "give a folder with config.json, tokenizer and model.safetensors of a CLIP model"
    return InputMissing("E-INP-028", SETTING, f"{name!r} holds no CLIP text model: {reason}", fix)


def _digest_of_files(paths: Sequence[Path]) -> str:
    """sha256 of one file, as `sha256sum` prints it; of several, the digest of their names and sha256."""
    digests = {path.name: artifacts.sha256_file(path) for path in paths}
    return digests[paths[0].name] if len(digests) == 1 else artifacts.digest(digests)


def tokenize(tokenizer: Any, texts: list[str], max_tokens: int) -> Any:
    """Padded to `max_tokens` always; what is beyond is cut, the markers of begin and end are kept."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")


def _count_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]] if captions else []
