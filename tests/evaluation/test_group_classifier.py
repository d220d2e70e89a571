"""The classifier of groups: it learns them, repeats to the bit, leaves the global random state alone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import group_classifier
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.group_classifier import Classifier, Unavailable, digest, group_cls, train
from pipeline.rng import generator_for
from tests.conftest import with_rows, write_prepared
from tests.evaluation.test_features import drawings


def stripes(n: int, resolution: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Coloured stripes with noise, horizontal (group 0) or vertical (group 1), which box sums cannot tell apart."""
    rng = np.random.default_rng(n)
    groups = rng.integers(0, 2, n)
    images = np.empty((n, 3, resolution, resolution))
    for image, group in zip(images, groups, strict=True):
        phase = 2 * np.pi * (np.arange(resolution) / 4 + rng.uniform())
        wave = np.broadcast_to(np.sin(phase)[:, None], (resolution, resolution))
        image[:] = 128 + 60 * rng.uniform(0.5, 1, (3, 1, 1)) * (wave if group == 0 else wave.T)
    return torch.from_numpy(images + rng.normal(0, 10, images.shape)).to(torch.uint8), torch.from_numpy(
        groups
    )


def test_it_learns_groups_that_it_can_see() -> None:
    net = train(*stripes(200), num_groups=2, num_images=3200)
    images, groups = stripes(100)
    assert (net.predict(images) == groups).float().mean() > 0.95


def test_training_repeats_to_the_bit_also_with_deterministic_algorithms_only() -> None:
    images, groups = stripes(40)
    first = digest(train(images, groups, 2, num_images=256))
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        second = digest(train(images, groups, 2, num_images=256))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second
    assert torch.equal(state, torch.get_rng_state()), "no use of the global random state"
    assert digest(train(images.flip(0), groups, 2, num_images=256)) != first


@pytest.mark.parametrize(("resolution", "dim"), [(8, 48), (16, 144), (32, 336), (64, 528), (128, 528)])
def test_it_takes_every_resolution(resolution: int, dim: int) -> None:
    net = Classifier(min(resolution, 64), 3, generator_for(0, "test")).requires_grad_(False)
    features = net.features(drawings(2, resolution=resolution).float())
    assert features.shape == (2, dim)
    assert net.dim == dim
    assert features.isfinite().all()


def test_augmented_images_stay_sharp_and_in_place() -> None:
    images = drawings(64).float()
    augmented = group_classifier.augment(images, generator_for(0, "test"))
    assert augmented.shape == images.shape
    assert 5 < (augmented - images).abs().mean() < 40
    assert not torch.equal(augmented[0], augmented[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    write_prepared(folder, count=60)
    return folder


@pytest.fixture()
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "prepared"))


def test_an_extractor_comes_with_its_digest_and_its_accuracy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_classifier, "NUM_IMAGES", 64)
    halves = lambda i: {"subgroup": "", "group": "ab"[i % 2]}  # noqa: E731
    extractor = group_cls(with_rows(folder, halves))
    assert isinstance(extractor, Extractor)
    assert extractor(drawings(3, resolution=16)).shape == (3, extractor.dim)
    assert len(extractor.sha256) == 64
    assert not extractor.related_to_discriminator
    assert extractor.details["groups"] == 2
    assert extractor.details["train_images"] == 40
    assert extractor.details["val_images"] == 10
    assert 0 <= extractor.details["val_accuracy"] <= 1
    assert extractor.details["val_most_common"] == 1.0, "the val split has even numbers only"


def test_only_the_train_split_is_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_classifier, "NUM_IMAGES", 64)

    def groups(held_out: str) -> Any:
        return lambda i: {"subgroup": "ab"[i % 2] if i % 6 < 4 else held_out}

    a, b = (group_cls(with_rows(folder, groups(name))) for name in ("a", "c"))
    assert isinstance(a, Extractor) and isinstance(b, Extractor)
    assert a.sha256 == b.sha256


def test_data_without_two_groups_has_no_such_extractor_and_says_why(folder: Path) -> None:
    one = group_cls(PreparedDataset(folder))
    rare = group_cls(with_rows(folder, lambda i: {"subgroup": "b" if i in (0, 1, 2) else "a"}))
    needs = "needs two groups of at least 8 training images; the largest have"
    assert one == Unavailable("group-cls", f"{needs} 's' 40")
    assert rare == Unavailable("group-cls", f"{needs} 'a' 37, 'b' 3")
