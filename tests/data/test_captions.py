"""Captions as clean text, and the offline encoder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import captions
from pipeline.errors import ConfigError, StorageError


def test_names_become_plain_english():
    assert captions.plain_english(":grinning_face:") == "grinning face"
    assert captions.plain_english(":thumbs_up_medium_skin_tone:") == "thumbs up medium skin tone"
    assert captions.plain_english("thumbs up: medium skin tone") == "thumbs up medium skin tone"
    assert captions.plain_english(":Japanese_\u201cacceptable\u201d_button:") == "japanese acceptable button"
    assert captions.plain_english(":two_o\u2019clock:") == "two o'clock"


def test_normalising_composes_and_drops_what_cannot_be_seen():
    assert captions.normalise("  a\tcafe\u0301 \n\x1b[31m\u202e\u200b x\x00 ") == "a caf\u00e9 [31m x"
    assert captions.normalise("\ufeff\n") == ""


@given(st.text())
def test_a_normalised_caption_is_one_clean_line_and_stays_so(text):
    clean = captions.normalise(text)
    assert captions.normalise(clean) == clean == clean.strip()
    assert len(clean.splitlines()) <= 1
    clean.encode("utf-8")


@pytest.fixture(scope="module")
def encoder():
    return captions.load_text_encoder("minilm", 16)


def test_the_encoder_gives_unit_vectors_and_masked_tokens(encoder):
    pooled, tokens, mask = encoder.encode(["grinning face", "", "thumbs up"])
    assert pooled.shape == (3, 384) and tokens.shape == (3, 16, 384) and mask.shape == (3, 16)
    assert (pooled.dtype, tokens.dtype, mask.dtype) == (np.float32, np.float32, np.bool_)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), [1, 0, 1], atol=1e-5)
    assert mask.sum(1).tolist() == [4, 0, 4]
    assert not tokens[~mask].any()
    assert encoder.info == {"name": "minilm", "sha256": captions.MINILM_SHA256, "dim": 384, "max_tokens": 16}


def test_near_meanings_are_near(encoder):
    pooled, _, _ = encoder.encode(["happy face", "smiling face", "raised fist"])
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2


def test_a_captions_vector_does_not_depend_on_its_company(encoder):
    texts = [f"face number {number}" for number in range(70)]
    together = encoder.encode(texts)
    alone = encoder.encode(texts[69:])
    for all_of_them, one in zip(together, alone, strict=True):
        assert np.array_equal(all_of_them[69:], one)


def test_the_pooled_vector_is_the_mean_of_the_tokens(encoder):
    pooled, tokens, mask = encoder.encode(["a red heart"])
    mean = tokens[0][mask[0]].mean(0)
    np.testing.assert_allclose(pooled[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_long_captions_are_cut_and_counted_whole(encoder):
    text = "word " * 50
    assert encoder.encode([text])[2].all()
    assert encoder.count_tokens([text, "word"]) == [52, 3]
    assert encoder.count_tokens([]) == []


def test_changed_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StorageError, match="expected 53aa51172d14"):
        captions.MiniLM(tmp_path, 16)


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ConfigError, match="'clap' is unknown"):
        captions.load_text_encoder("clap", 16)
