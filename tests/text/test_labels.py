"""One-hot vectors of labels."""

import numpy as np
import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.text import labels
from pipeline.text.load import encoder_of, load_text_encoder


def test_labels_are_rows_of_the_identity_in_order_of_the_alphabet() -> None:
    encoder = load_text_encoder("label", 16, ["dog", "cat", "", "dog", "猫"])
    pooled, tokens, mask = encoder.encode(["猫", "cat", "", "dog"])
    assert encoder.info["labels"] == ["cat", "dog", "猫"] and encoder.info["dim"] == 8
    assert pooled.argmax(1).tolist() == [2, 0, 0, 1] and pooled.sum(1).tolist() == [1, 1, 0, 1]
    assert np.array_equal(tokens[:, 0], pooled) and mask[:, 0].tolist() == [True, True, False, True]
    assert encoder.count_tokens(["cat", " "]) == [1, 0]


def test_more_than_eight_labels_have_a_dimension_each() -> None:
    assert load_text_encoder("label", 4, [str(i) for i in range(11)]).info["dim"] == 11


def test_the_order_of_captions_does_not_change_the_encoder() -> None:
    assert labels.Labels(["b", "a", "a"]).info == labels.Labels(["a", "b"]).info


@pytest.mark.parametrize(
    "prompt, cure",
    [("catt", "did you mean 'cat'"), ("xyz", "use a label such as: cat, dog"), ("q" * 10**6, "use a label")],
)
def test_a_prompt_that_is_no_label_is_refused_in_one_line(prompt, cure) -> None:
    with pytest.raises(ConfigError, match=f"E-CFG-015 prompt: .*is not a label.*{cure}") as caught:
        load_text_encoder("label", 16, ["cat", "dog"]).encode([prompt])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_too_many_captions_are_no_labels() -> None:
    with pytest.raises(ConfigError, match="E-CFG-014.*has 4097 different captions, the limit is 4096"):
        load_text_encoder("label", 16, [f"caption {i}" for i in range(4097)])


def test_a_changed_list_of_labels_is_refused() -> None:
    info = {**labels.Labels(["cat", "dog"]).info, "labels": ["cat", "fox"]}
    with pytest.raises(StorageError, match="E-IO-041"):
        encoder_of(info)
