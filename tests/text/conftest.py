"""Text encoders to try: MiniLM, labels, and a tiny CLIP with random weights."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.text.load import load_text_encoder

COLOURS = [f"a {size} {colour} {thing}" for size in ("big", "small") for colour in ("red", "blue", "green")
           for thing in ("cat", "dog", "hat of straw")]  # fmt: skip


def write_clip(folder: Path, projects: bool = True, positions: int = 20) -> Path:
    """A tiny CLIP text model with random weights, and its tokenizer, as old repositories have them."""
    folder.mkdir(parents=True)
    signs = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    words = [*signs, *(f"{sign}</w>" for sign in signs), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    kind(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def clip(clip_folder):
    return load_text_encoder(f"clip:{clip_folder}", 12)


@pytest.fixture(scope="session")
def minilm():
    return load_text_encoder("minilm", 16)


@pytest.fixture(params=["minilm", "label", "clip"])
def encoder(request, minilm, clip):
    return {"minilm": minilm, "clip": clip, "label": load_text_encoder("label", 16, COLOURS)}[request.param]
