"""Networks from files: random weights in the published formats give what the libraries themselves give."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from pipeline.artifacts import sha256_file
from pipeline.config.params import ExtractorSetting
from pipeline.errors import InputMissing, PipelineError, StorageError
from pipeline.evaluation import pretrained
from pipeline.evaluation.features import Extractor
from tests.evaluation.test_features import drawings

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def digest_of(folder: Path) -> str:
    return sha256_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights; like the real ones, its positions are those of a larger image."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=518)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SMALL, image_size=56, patch_size=14, intermediate_size=64, projection_dim=24)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict in the layout of pt_inception-2015-12-05, with random weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        net = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(net.state_dict(), path)
    return path


def test_dinov2_is_the_class_token_of_transformers_model(dinov2_folder: Path) -> None:
    extractor = pretrained.dinov2(str(dinov2_folder), digest_of(dinov2_folder))
    images = drawings(3, resolution=224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixels).pooler_output
    np.testing.assert_allclose(extractor(images), expected.double().numpy(), atol=1e-5)
    assert extractor.dim == 32
    assert extractor(drawings(2)).shape == (2, 32), "images of any size"
    assert not extractor.related_to_discriminator


def test_clip_is_what_its_own_preprocessing_and_transformers_give(clip_folder: Path) -> None:
    extractor = pretrained.clip(str(clip_folder), digest_of(clip_folder))
    images = drawings(3, resolution=56)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()(pixels).image_embeds
    np.testing.assert_allclose(extractor(images), expected.double().numpy(), atol=1e-5)
    assert extractor.dim == 24
    assert extractor(drawings(2)).shape == (2, 24)


def test_inception_is_torch_fidelitys(inception_file: Path) -> None:
    extractor = pretrained.inception(str(inception_file), sha256_file(inception_file))
    images = drawings(2)
    net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(inception_file))
    with torch.no_grad():
        expected = net(images)[0]
    np.testing.assert_array_equal(extractor(images), expected.double().numpy())
    assert extractor.dim == expected.shape[1] == 2048
    assert extractor.related_to_discriminator


def load(name: str, weights: Path | str, sha256: str) -> Extractor:
    """By the setting, as it is checked in params.yaml."""
    setting = ExtractorSetting(name=name, weights=str(weights), sha256=sha256)
    return getattr(pretrained, name)(setting.weights, setting.sha256)


def refused(name: str, weights: Path | str, sha256: str) -> str:
    """The one line of the error."""
    with pytest.raises(PipelineError) as caught:
        load(name, weights, sha256)
    assert isinstance(caught.value, InputMissing | StorageError)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and f"evaluate.extractors: {name}" in line
    return line


def test_weights_of_another_digest_are_refused_with_both(
    dinov2_folder: Path, clip_folder: Path, inception_file: Path
) -> None:
    for name, weights in (("dinov2", dinov2_folder), ("clip", clip_folder), ("inception", inception_file)):
        real = sha256_file(weights if weights.is_file() else weights / "model.safetensors")
        line = refused(name, weights, "b" * 64)
        assert line.startswith("E-IO-051") and f"has sha256 {real}, expected bbbbbbbbbbbb" in line


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert refused("inception", tmp_path / "none.pth", "a" * 64).startswith("E-INP-053")
    assert "there is no config.json" in refused("dinov2", tmp_path, "a" * 64)
    line = refused("clip", tmp_path / "no folder", "a" * 64)  # and no possible name on the hub
    assert line.startswith("E-INP-051") and "is not a folder, nor to be had from the hub" in line


def test_another_model_is_refused(dinov2_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    assert "holds no clip model" in refused("clip", dinov2_folder, digest_of(dinov2_folder))
    assert "holds no dinov2 model" in refused("dinov2", clip_folder, digest_of(clip_folder))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    line = refused("inception", tmp_path / "other.pth", sha256_file(tmp_path / "other.pth"))
    assert line.startswith("E-INP-052") and "holds no inception model" in line


def test_a_truncated_safetensors_file_is_refused(dinov2_folder: Path, tmp_path: Path) -> None:
    shutil.copy(dinov2_folder / "config.json", tmp_path)
    content = (dinov2_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:2000])
    assert "holds no dinov2 model" in refused("dinov2", tmp_path, digest_of(tmp_path))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(dinov2_folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    torch.save({"x": Trap(trap)}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Trap(trap)))
    for name in ("evil.pth", "evil.pkl"):
        refused("inception", tmp_path / name, sha256_file(tmp_path / name))
    shutil.copy(dinov2_folder / "config.json", tmp_path)
    shutil.copy(tmp_path / "evil.pth", tmp_path / "pytorch_model.bin")
    assert "there is no model.safetensors" in refused("dinov2", tmp_path, "a" * 64)
    assert not trap.exists()
