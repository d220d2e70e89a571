"""Copies are sought among all training images, whatever the size of the set that distances are measured to."""

from pathlib import Path

import numpy as np
import torch

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.copies import search_copies
from pipeline.evaluation.memorisation import ALIKE
from tests.conftest import write_dataset


def write_textures(path: Path, count: int) -> PreparedDataset:
    """Smooth random images of 16 px, a third of them held out."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (torch.nn.functional.interpolate(coarse, size=16, mode="bilinear") * 255).to(torch.uint8)
    rows: list[dict[str, object]] = [
        {"id": str(i), "split": "test" if i % 3 == 2 else "train", "base": "", "captions": [i]}
        for i in range(count)
    ]
    vectors = np.random.default_rng(0).standard_normal((count, 3, 8)).astype(np.float16)
    write_dataset(path, images.numpy(), rows, [f"texture {i}" for i in range(count)], vectors)
    return PreparedDataset(path)


def test_a_copy_of_any_training_image_is_found(tmp_path: Path) -> None:
    dataset = write_textures(tmp_path / "prepared", 90)
    rows = dataset.split("train")
    images = {"heldout": {"real": dataset.images(dataset.split("test")), "copies": dataset.images(rows)}}
    found = search_copies(images, dataset, rows[:20])
    copies = found.neighbours["heldout"]["copies"]
    assert copies.row.tolist() == rows.tolist()
    assert (copies.rho < ALIKE).all()
    assert (found.neighbours["heldout"]["real"].rho > ALIKE).mean() > 0.9
    assert len(found.reference.rho) == 20
    assert len(np.unique(found.reference.families)) == 20
    assert (found.reference.rho > ALIKE).mean() > 0.9
    assert found.power["noise, 4 grey levels"] > 0.9
    assert found.power["no copies: real images of other families"] < 0.1
