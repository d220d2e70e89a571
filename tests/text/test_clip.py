"""The text half of CLIP, beside transformers' (a tiny one with random weights)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipeline import artifacts
from pipeline.errors import ConfigError, InputMissing, StorageError
from pipeline.text.clip import tokenize
from pipeline.text.load import encoder_of, load_text_encoder
from tests.text.conftest import COLOURS, write_clip


@pytest.mark.parametrize("projects", [True, False])
def test_clip_gives_what_transformers_gives(tmp_path, projects) -> None:
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


def test_clip_cuts_long_captions_and_keeps_the_end_marker(clip, clip_folder) -> None:
    text = "z" + "y x " * 40
    assert clip.encode([text])[2].all() and clip.count_tokens([text]) == [83]
    ids = tokenize(clip._tokenizer, [text], 12)["input_ids"][0].tolist()
    config = json.loads((clip_folder / "config.json").read_text())
    assert ids[0] == config["bos_token_id"] and ids[-1] == config["eos_token_id"]
    assert config["eos_token_id"] not in ids[:-1]
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    inputs = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        wanted = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()(**inputs).text_embeds[0]
    np.testing.assert_allclose(clip.encode([text])[0][0], (wanted / wanted.norm()).numpy(), atol=1e-6)


def test_clip_is_known_by_the_bytes_of_its_weights(clip, clip_folder) -> None:
    digest = artifacts.sha256_file(clip_folder / "model.safetensors")
    assert clip.info == {"name": f"clip:{clip_folder}", "sha256": digest, "dim": 32, "max_tokens": 12}


def test_clip_in_several_files_is_known_by_all_of_them(clip, clip_folder, tmp_path) -> None:
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


def test_a_snapshot_of_other_clip_weights_is_refused(clip, clip_folder, tmp_path) -> None:
    other = Path(shutil.copytree(clip_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(StorageError, match="E-IO-041"):
        encoder_of({**clip.info, "name": f"clip:{other}"})


def only_bin(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def another_model(folder) -> None:
    save_file({"bert.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def bad_index(folder) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def another_vocabulary(folder) -> None:
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
def test_a_folder_without_a_whole_clip_model_is_refused_in_one_line(clip_folder, tmp_path, name) -> None:
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
def test_a_name_that_is_neither_here_nor_downloadable_is_refused_in_one_line(
    monkeypatch, tmp_path, name
) -> None:
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


def test_a_clip_name_on_the_hub_is_downloaded_without_other_formats(monkeypatch, clip_folder, clip) -> None:
    import huggingface_hub

    heard = {}

    def download(name, allow_patterns):
        heard.update(name=name, patterns=allow_patterns)
        return str(clip_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    encoder = load_text_encoder("clip:some/clip", 12)
    assert encoder.info == {**clip.info, "name": "clip:some/clip"} and heard["name"] == "some/clip"
    assert not any(pattern.endswith((".bin", ".py", ".h5", ".msgpack", "*")) for pattern in heard["patterns"])


def test_more_tokens_than_clip_reads_are_refused(clip_folder) -> None:
    with pytest.raises(ConfigError, match="E-CFG-013 data.max_tokens: 21 is more than the 20 that clip:"):
        load_text_encoder(f"clip:{clip_folder}", 21)
    assert load_text_encoder(f"clip:{clip_folder}", 20).encode(["a cat"])[1].shape == (1, 20, 32)


def test_loading_prints_nothing_and_no_tokenizer_complains(clip_folder, capfd) -> None:
    load_text_encoder(f"clip:{clip_folder}", 12).count_tokens(["y x " * 400])
    assert capfd.readouterr() == ("", "")
