"""What every text encoder does."""

import json

import numpy as np
import pytest

from pipeline.errors import StorageError
from pipeline.text.load import encoder_of
from tests.text.conftest import COLOURS


def test_vectors_have_the_shapes_that_info_says_and_pooled_has_unit_length(encoder) -> None:
    pooled, tokens, mask = encoder.encode([COLOURS[0], "", COLOURS[5]])
    dim, length = encoder.info["dim"], encoder.info["max_tokens"]
    assert pooled.shape == (3, dim) and tokens.shape == (3, length, dim) and mask.shape == (3, length)
    assert (pooled.dtype, tokens.dtype, mask.dtype) == (np.float32, np.float32, np.bool_)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), [1, 0, 1], atol=1e-5)
    assert mask.any(1).tolist() == [True, False, True]
    assert not tokens[~mask].any() and tokens[mask].any(1).all()
    counts = encoder.count_tokens([COLOURS[0], COLOURS[5]])
    assert mask[[0, 2]].sum(1).tolist() == [min(count, length) for count in counts]


def test_vectors_do_not_depend_on_company_or_place(encoder) -> None:
    texts = COLOURS * 5
    order = np.random.default_rng(0).permutation(len(texts))
    together = encoder.encode(texts)
    mixed = encoder.encode([texts[i] for i in order])
    for straight, shuffled in zip(together, mixed, strict=True):
        assert np.array_equal(straight[order], shuffled)
    for start, count in ((7, 1), (0, 4), (3, 5), (40, 18), (1, 63)):
        some = encoder.encode(texts[start : start + count])
        for straight, part in zip(together, some, strict=True):
            assert np.array_equal(straight[start : start + count], part)


def test_info_as_json_is_enough_to_build_it_again(encoder) -> None:
    again = encoder_of(json.loads(json.dumps(encoder.info)))
    assert again.info == encoder.info
    for one, other in zip(encoder.encode(COLOURS[:3]), again.encode(COLOURS[:3]), strict=True):
        assert np.array_equal(one, other)


def test_a_snapshot_of_another_encoder_is_refused(encoder) -> None:
    info = {**encoder.info, "sha256": "0" * 64}
    with pytest.raises(StorageError, match="E-IO-041 models/x: was trained with text encoder 000000000000"):
        encoder_of(info, "models/x")


def test_no_captions_are_no_rows(encoder) -> None:
    assert [len(array) for array in encoder.encode([])] == [0, 0, 0]
    assert encoder.count_tokens([]) == []
