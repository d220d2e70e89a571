"""Vectors that are kept."""

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.text.cache import encode_cached
from pipeline.text.load import load_text_encoder
from tests.text.conftest import COLOURS


class Counting:
    """An encoder that counts what it is asked for."""

    def __init__(self, encoder) -> None:
        self.encoder, self.info, self.asked = encoder, encoder.info, []

    def encode(self, captions):
        self.asked += captions
        return self.encoder.encode(captions)


@pytest.fixture
def blocks_of_ten(monkeypatch) -> None:
    monkeypatch.setattr("pipeline.text.cache.CACHE_CAPTIONS", 10)


def same(one, other):
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def halves(encoder, captions):
    pooled, tokens, mask = encoder.encode(captions)
    return pooled.astype(np.float16), tokens.astype(np.float16), mask


def test_cached_vectors_are_the_encoders_own_in_half_precision(encoder, tmp_path) -> None:
    texts = [*COLOURS, "", *COLOURS[:3]]
    first = encode_cached(encoder, texts, tmp_path)
    assert same(first, halves(encoder, texts)) and same(first, encode_cached(encoder, texts, tmp_path))


def test_only_new_captions_are_encoded_and_bytes_are_equal(encoder, tmp_path, blocks_of_ten) -> None:
    counting = Counting(encoder)
    encode_cached(counting, COLOURS[:7], tmp_path)
    assert counting.asked == COLOURS[:7]
    counting.asked.clear()
    texts = COLOURS[::-1] + COLOURS[3:5]
    grown = encode_cached(counting, texts, tmp_path)
    assert counting.asked == COLOURS[:6:-1]
    assert same(grown, encode_cached(encoder, texts, tmp_path / "fresh")) and same(
        grown, halves(encoder, texts)
    )
    counting.asked.clear()
    assert same(encode_cached(counting, texts, tmp_path), grown) and not counting.asked


def test_equal_runs_write_equal_files(clip, tmp_path, blocks_of_ten) -> None:
    for name in ("a", "b"):
        encode_cached(clip, COLOURS, tmp_path / name)
    a, b = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "ab")
    assert a == b and len(a) == 2


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path) -> None:
    path.write_bytes(b"")


def rename(path) -> None:
    path.rename(path.with_name("0" * 64 + ".safetensors"))


@pytest.mark.parametrize("damage", [cut, flip, empty, rename])
def test_a_damaged_file_is_made_again(clip, tmp_path, blocks_of_ten, damage) -> None:
    wanted = encode_cached(clip, COLOURS, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    damage(files[0])
    counting = Counting(clip)
    assert same(encode_cached(counting, COLOURS, tmp_path), wanted)
    assert 0 < len(counting.asked) < len(COLOURS)
    assert sorted(tmp_path.rglob("*.safetensors")) == files and [p.read_bytes() for p in files] == before


def test_a_killed_writer_leaves_nothing_that_is_read(clip, tmp_path, blocks_of_ten) -> None:
    class Killed(Counting):
        def encode(self, captions):
            if self.asked:
                raise KeyboardInterrupt
            return super().encode(captions)

    with pytest.raises(KeyboardInterrupt):
        encode_cached(Killed(clip), COLOURS, tmp_path)
    (block,) = tmp_path.rglob("*.safetensors")
    (block.parent / f"{block.name}.tmp-1-ab").write_bytes(b"half")
    counting = Counting(clip)
    assert same(encode_cached(counting, COLOURS, tmp_path), halves(clip, COLOURS))
    assert counting.asked == COLOURS[10:]


def test_encoders_do_not_share_vectors(clip, clip_folder, tmp_path) -> None:
    encode_cached(clip, COLOURS, tmp_path)
    longer = Counting(load_text_encoder(f"clip:{clip_folder}", 14))
    assert encode_cached(longer, COLOURS, tmp_path)[1].shape == (18, 14, 32)
    assert longer.asked == COLOURS and len(list(tmp_path.iterdir())) == 2


def test_progress_counts_different_captions(clip, tmp_path, blocks_of_ten) -> None:
    calls = []
    encode_cached(clip, COLOURS + COLOURS, tmp_path, lambda done, total: calls.append((done, total)))
    encode_cached(clip, COLOURS, tmp_path, lambda done, total: calls.append((done, total)))
    assert calls[:2] == [(10, 18), (18, 18)] and calls[-1] == (18, 18)


def test_no_captions_and_a_folder_that_cannot_be_made(clip, tmp_path) -> None:
    assert [array.shape for array in encode_cached(clip, [], tmp_path / "none")] == [
        (0, 32),
        (0, 12, 32),
        (0, 12),
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, PipelineError)):
        encode_cached(clip, COLOURS[:1], tmp_path / "file")
