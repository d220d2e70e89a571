"""Networks that the field measures with, from files that the user gives: DINOv2, Inception-v3, CLIP.

DINOv2 (arXiv 2304.07193) agrees best with human judgement (arXiv 2306.04675). Inception-v3 as torch-fidelity has
it is what published FID means; it was trained on ImageNet, like the discriminator Lite0 (arXiv 2203.06026). CLIP's
image tower (arXiv 2103.00020) is that of CMMD (arXiv 2401.09603). Weights are pinned by their sha256, and read as
safetensors or by torch.load(weights_only=True): no file runs code.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.artifacts import sha256_file
from pipeline.errors import InputMissing, PipelineError, StorageError
from pipeline.evaluation.features import Extractor
from pipeline.progress import quiet_transformers

DINOV2_RESOLUTION = 224  # px, 16 x 16 patches, as FD-DINOv2 is measured
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def dinov2(weights: str, sha256: str, device: str = "cpu") -> Extractor:
    """DINOv2 of any size, the last layer's class token: 384-d (ViT-S), 768-d (B), 1024-d (L), 1536-d (g).

    Args:
        weights: a folder with config.json and model.safetensors, as transformers writes it, or a name on the hub.
        sha256: digest of model.safetensors.

    Raises:
        InputMissing: there is no such folder or repository, or no such model in it.
        StorageError: its weights have another digest.
    """
    net = _load_transformer("dinov2", "Dinov2Model", weights, sha256).to(device)

    def embed(images: Tensor) -> Tensor:
        x = _resize(images, DINOV2_RESOLUTION, IMAGENET_MEAN, IMAGENET_STD)
        features: Tensor = net(pixel_values=x).last_hidden_state[:, 0]
        return features

    return Extractor("dinov2", sha256, False, embed, device, dim=int(net.config.hidden_size))


def clip(weights: str, sha256: str, device: str = "cpu") -> Extractor:
    """The image tower of a CLIP model with its projection: 512-d (ViT-B), 768-d (ViT-L).

    Arguments and errors: see `dinov2`."""
    net = _load_transformer("clip", "CLIPVisionModelWithProjection", weights, sha256).to(device)

    def embed(images: Tensor) -> Tensor:
        x = _resize(images, int(net.config.image_size), CLIP_MEAN, CLIP_STD)
        features: Tensor = net(pixel_values=x).image_embeds
        return features

    return Extractor("clip", sha256, False, embed, device, dim=int(net.config.projection_dim))


def inception(weights: str, sha256: str, device: str = "cpu") -> Extractor:
    """The Inception-v3 of FID, its last pooled features: 2048-d, computed by torch-fidelity's own network.

    Args:
        weights: a file in the layout of pt_inception-2015-12-05, as pytorch-fid and torch-fidelity publish it.
        sha256: its digest.

    Raises:
        InputMissing: the package or the file is missing, or holds something else.
        StorageError: the file has another digest.
    """
    path = Path(weights)
    if not path.is_file():
        fix = "give the path of a file such as pt_inception-2015-12-05-6726825d.pth"
        raise InputMissing("E-INP-053", _where("inception"), f"{weights!r} is not a file", fix)
    content = path.read_bytes()
    _check_digest("inception", weights, hashlib.sha256(content).hexdigest(), sha256)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        fix = "pip install 'crescendo[inception]'"
        where = _where("inception")
        raise InputMissing("E-INP-054", where, "package torch-fidelity is not installed", fix) from None
    # Its constructor would unpickle anything: it is handed tensors only, which were read safely here.
    buffer = io.BytesIO()
    try:
        torch.save(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), buffer)
        buffer.seek(0)
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
    except Exception as exc:  # unpickling and loading a state dict raise various ones
        raise _no_model("inception", weights, exc) from exc
    net.to(device)

    def embed(images: Tensor) -> Tensor:
        features: Tensor = net(images.to(torch.uint8))[0]
        return features

    return Extractor("inception", sha256, True, embed, device, dim=2048)


def _resize(
    images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:  # [B,3,size,size]
    """Images in 0..255, resized by antialiased bicubic interpolation, in the network's units."""
    x = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def _load_transformer(name: str, kind: str, weights: str, sha256: str) -> Any:
    """The frozen model of transformers' class `kind` in a folder or a repository of the hub."""
    folder = _folder(name, weights)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise _no_model(name, weights, f"there is no {file}")
    _check_digest(name, weights, sha256_file(folder / "model.safetensors"), sha256)
    import transformers

    try:
        with quiet_transformers():
            net, report = getattr(transformers, kind).from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as exc:  # transformers raises nothing narrower
        raise _no_model(name, weights, exc) from exc
    if missing := sorted(report["missing_keys"]):
        raise _no_model(name, weights, f"{len(missing)} tensors are missing, first: {missing[0]}")
    return net.eval().requires_grad_(False)


def _folder(name: str, weights: str) -> Path:
    """The folder `weights`, or the hub's repository of that name, downloaded unless it was before."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers():
            return Path(snapshot_download(weights, allow_patterns=["config.json", "model.safetensors"]))
    except (OSError, ValueError) as exc:
        problem = f"{weights!r} is not a folder, nor to be had from the hub ({type(exc).__name__})"
        fix = f"download it where there is a network (hf download {weights}) and give its folder"
        raise InputMissing("E-INP-051", _where(name), problem, fix) from exc


def _check_digest(name: str, weights: str, sha256: str, expected: str) -> None:
    if sha256 != expected:
        problem = f"{weights!r} has sha256 {sha256}, expected {expected[:12]}"
        fix = "get the right file, or, if you trust this one, write its sha256"
        raise StorageError("E-IO-051", _where(name), problem, fix)


def _no_model(name: str, weights: str, reason: object) -> PipelineError:
    first_line = str(reason).strip().partition("\n")[0][:200]
    fix = "give the weights of such a network" if name == "inception" else "give a folder of such a model"
    return InputMissing("E-INP-052", _where(name), f"{weights!r} holds no {name} model: {first_line}", fix)


def _where(name: str) -> str:
    return f"evaluate.extractors: {name}"
