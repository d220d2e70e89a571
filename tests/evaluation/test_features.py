"""Extractors: fixed weights, one path for all images, and distances that mean something."""

import numpy as np
import pytest
import torch

from pipeline.adversarial import efficientnet
from pipeline.errors import StorageError
from pipeline.evaluation import features
from pipeline.evaluation.metrics import kid


def drawings(n: int, seed: int = 0, resolution: int = 64) -> torch.Tensor:
    """Coloured ellipses on white, with an outline: something with edges and shapes."""
    rng = np.random.default_rng([seed, n])
    y, x = np.mgrid[:resolution, :resolution] / resolution
    images = np.full((n, 3, resolution, resolution), 255.0)
    for image in images:
        for _ in range(rng.integers(1, 4)):
            cx, cy, a, b = *rng.uniform(0.3, 0.7, 2), *rng.uniform(0.1, 0.35, 2)
            level = ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2
            image[:, level < 1] = rng.uniform(0, 255, 3)[:, None]
            image[:, (level > 0.85) & (level < 1)] = 0
    return torch.from_numpy(images.astype(np.uint8))


def test_randconv_has_known_weights_and_512_features() -> None:
    extractor = features.randconv(64)
    assert extractor.sha256 == "5c439206520d9b38d6a9936c107a7e8d2a0378ace5749196ee04db12b140ec0c"
    assert extractor(drawings(3)).shape == (3, 512)
    assert not extractor.related_to_discriminator


def test_another_seed_gives_another_network_with_another_hash() -> None:
    assert features.randconv(64, seed=1).sha256 != features.randconv(64).sha256


@pytest.mark.parametrize("resolution", [16, 32, 128])
def test_randconv_takes_every_resolution(resolution: int) -> None:
    values = features.randconv(resolution)(drawings(2, resolution=resolution))
    assert np.isfinite(values).all()


@pytest.mark.parametrize("build", [lambda: features.randconv(64), lambda: features.lite2(64)])
def test_features_do_not_depend_on_the_batch(build: object) -> None:
    extractor = build()  # type: ignore[operator]
    images = drawings(5)
    together, in_parts = extractor(images), extractor(images, batch_size=2)
    np.testing.assert_allclose(together, in_parts, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(together, extractor(images))


def test_lite2_gives_1280_features_and_is_related_to_the_discriminator() -> None:
    extractor = features.lite2(64)
    assert extractor(drawings(2)).shape == (2, 1280)
    assert extractor.related_to_discriminator


def test_lite2_sees_what_its_pixels_show() -> None:
    plain = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    grain = plain.clone()
    grain[..., ::2, 1::2] += 60
    grain[..., 1::2, ::2] += 60
    grain[..., ::2, ::2] -= 60
    grain[..., 1::2, 1::2] -= 60
    seen = {
        size: np.abs(np.diff(features.lite2(size)(torch.cat([plain, grain])), axis=0)) for size in (64, 256)
    }
    assert seen[256].mean() > 10 * seen[64].mean()


def test_weights_that_are_not_the_known_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(efficientnet.SHA256, "lite2", "0" * 64)
    with pytest.raises(StorageError, match=r"E-IO-050.*expected 000000000000"):
        features.lite2(64)


def test_whitened_reference_features_have_unit_covariance() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(400, 30)) @ rng.normal(size=(30, 30)) + 5
    white = features.Whitening.fit(raw, dim=12)(raw)
    np.testing.assert_allclose(np.cov(white, rowvar=False, bias=True), np.eye(12), atol=1e-9)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-9)


def test_whitening_keeps_fewer_components_for_few_images() -> None:
    rng = np.random.default_rng(0)
    assert features.Whitening.fit(rng.normal(size=(40, 30)))(rng.normal(size=(3, 30))).shape == (3, 10)


def test_a_feature_that_is_constant_in_the_reference_cannot_explode() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(100, 8))
    raw[:, 3] = 0.25
    other = rng.normal(size=(50, 8))
    assert np.abs(features.Whitening.fit(raw)(other)).max() < 100


def test_kid_on_randconv_ranks_damage_by_its_strength() -> None:
    """Fresh drawings are at the noise floor; blur, a change of layout and collapse are far from it."""
    extractor = features.randconv(32)
    train, real, fresh = (drawings(n, seed, resolution=32) for n, seed in ((160, 0), (80, 1), (80, 2)))
    whiten = features.Whitening.fit(extractor(train))

    def distance(images: torch.Tensor) -> float:
        return kid(whiten(extractor(real)), whiten(extractor(images)))

    noise = abs(distance(fresh))
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(fresh.float(), [1] * 4), 3, 1)
    shuffled = fresh.reshape(80, 3, 2, 16, 32).flip(2).reshape(80, 3, 32, 32)
    collapsed = fresh[torch.arange(80) % 10]
    for damaged in (soft.to(torch.uint8), shuffled, collapsed):
        assert distance(damaged) > 5 * noise
        assert distance(damaged) > 0.02


def test_core_images_are_enlarged_by_bicubic_interpolation_and_others_left_alone() -> None:
    images = drawings(2, resolution=32)
    large = features.to_resolution(images, 64)
    assert large.shape == (2, 3, 64, 64)
    assert large.dtype == torch.uint8
    assert features.to_resolution(large, 64) is large
    back = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (back - images.float()).abs().mean() < 4
