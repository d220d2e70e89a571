"""Upscaling: tiles that leave no trace, low bands that stay, any size."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.adversarial.few_step import HANDOVER, few_step
from pipeline.errors import ConfigError
from pipeline.inference.upscaling import (
    ImageTiles,
    UpscaleSettings,
    add_high_band,
    add_high_band_at_once,
    doubled_rows,
    karras_sigmas,
    noise_window,
    project_to_low_band,
    shells_for,
    to_grey,
    upscale,
)
from pipeline.models.resample import pool, upsample
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from tests.builders import build_pyramid, no_text, snapshot_config

NET = {"patch": 1, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 1, "channels": 8, "num_blocks": 1, "bands": True}
NOTHING = no_text(1)


def model(size: int = 16, shells: int = 1, kind: str = "finetuned", **net: object) -> Snapshot:
    """A model with random weights and gains whose core works at `size` px."""
    denoiser = build_pyramid(size, (0.04,) * shells, core={**NET, **net}, shell=SHELL, gain=0.5)
    config = snapshot_config(denoiser, kind, statistics=Statistics((0.2, 0.0, -0.2), (0.6, 0.5, 0.4)))
    return Snapshot(denoiser.eval().requires_grad_(False), config, "")


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey slopes with noise, black and white parts."""
    draw = np.random.default_rng(seed)
    slope = np.linspace(-80, 335, width)[None, :, None] + np.linspace(-40, 40, height)[:, None, None]
    return np.clip(slope + draw.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


# --- Noise and tiles.


def test_noise_is_a_function_of_seed_and_place() -> None:
    whole = noise_window(1, "high", 0, 0, 200)
    assert torch.equal(noise_window(1, "high", 37, 70, 96), whole[:, 37:133, 70:166])
    assert not torch.equal(noise_window(2, "high", 0, 0, 200), whole)
    assert not torch.equal(noise_window(1, "low", 0, 0, 200), whole)
    assert abs(float(whole.mean())) < 0.01 and float(whole.std()) == pytest.approx(1, abs=0.01)
    assert not torch.equal(whole[:, :64, :64], whole[:, 64:128, :64])


@pytest.mark.parametrize(("size", "overlap"), [(16, 4), (16, 8), (32, 8), (8, 0)])
def test_weights_of_neighbours_sum_to_one_and_are_zero_at_the_border(size: int, overlap: int) -> None:
    for length in (1, size - 1, size, size + 1, 3 * size, 97):
        tiles = ImageTiles(length, size, overlap)
        total = torch.zeros(tiles.padded)
        for i, start in enumerate(tiles.starts):
            weights = tiles.weights(i)
            total[start : start + size] += weights
            if i > 0 and overlap:
                assert not weights[: overlap // 4].any() and weights[0] == 0
        torch.testing.assert_close(total, torch.ones_like(total))
        assert tiles.padded >= length
        assert len(tiles.starts) == 1 or length - tiles.starts[-1] > overlap, "the last tile is needed"


def test_rows_are_finished_one_after_the_other() -> None:
    asked: list[int] = []

    def double(images: torch.Tensor, draw: object) -> torch.Tensor:
        asked.append(len(images))
        return upsample(images.float())

    picture = photo(100, 61)
    rows, heights, made = doubled_rows(picture, 16, 4, 0, double, batch_size=3), [], []
    for number, row in enumerate(rows, start=1):
        assert sum(asked) == 5 * number and max(asked) == 3, "no tile is made before its row"
        heights.append(row.shape[1])
        made.append(row)
    assert sum(heights) == 200 and max(heights) <= 32
    expected = upsample(torch.from_numpy(picture).permute(2, 0, 1)[None].float())[0]
    torch.testing.assert_close(torch.cat(made, dim=1), expected)


def test_away_from_blends_tiles_are_the_whole_picture_in_one_pass() -> None:
    """In one step a pixel sees 9 + 9 px of the small picture. Half of a tile of 64 px overlaps: what is 18 px from
    its border, and so all that counts fully there, knows of no tile. What is left is rounding."""
    snapshot, picture = model(64), photo(160, 160)
    shell = shells_for(snapshot, 2)[0]
    low = snapshot.statistics.standardise(torch.from_numpy(picture).permute(2, 0, 1)[None])

    def draw(purpose: str, px: int) -> torch.Tensor:
        return noise_window(3, purpose, 0, 0, px)[None]

    sigmas = karras_sigmas(1, 8 * shell.sigma_high_band, 0.002)
    made = add_high_band(shell, low, NOTHING, sigmas, 0.05, "dpmpp_2m", draw)
    whole = to_grey(made, snapshot.statistics).clamp(0, 255)[0].permute(1, 2, 0).numpy()

    def apart(overlap: float) -> np.ndarray:
        settings = UpscaleSettings(num_steps=1, project=False, overlap=overlap)
        tiled = upscale(snapshot, picture, NOTHING, 3, settings)
        return np.abs(tiled - whole).max((0, 2))  # [columns]

    middle = np.concatenate([np.arange(2 * (start + 24), 2 * (start + 40)) for start in (0, 32, 64, 96)])
    assert apart(0.5)[middle].max() <= 0.51
    assert apart(0.0).max() > 2, "tiles that do not overlap show"


def test_tiles_that_disagree_fade_into_one_another() -> None:
    def double(images: torch.Tensor, draw: object) -> torch.Tensor:
        bright = torch.arange(len(images)) % 2  # every other tile
        return 60.0 * bright[:, None, None, None] + torch.zeros(len(images), 3, 32, 32)

    def largest_step(overlap: int) -> float:
        rows = list(doubled_rows(photo(50, 100), 16, overlap, 0, double, 32))
        return float(torch.cat(rows, dim=1).diff(dim=2).abs().max())

    assert largest_step(0) == 60
    assert largest_step(8) == pytest.approx(60 / 4)  # over half of the overlap, 4 px of the picture


# --- Pictures.


@pytest.mark.parametrize("factor", [2, 4])
def test_the_means_of_boxes_are_the_picture_within_one_level(factor: int) -> None:
    snapshot, picture = model(), photo(21, 50)
    made = upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(factor, 2))
    boxes = made.reshape(21, factor, 50, factor, 3).astype(float)
    assert np.abs(boxes.mean((1, 3)) - picture).max() <= 1
    assert boxes.std((1, 3)).mean() > 2, "there is detail"
    free = upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(factor, 2, project=False))
    assert np.abs(free.reshape(21, factor, 50, factor, 3).mean((1, 3)) - picture).max() > 1


def test_detail_shrinks_where_it_would_leave_the_range() -> None:
    low = torch.tensor([0.0, 100.0, 250.0, 255.0]).expand(3, 1, 4)
    high = 40 * torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    made = project_to_low_band(high, low)
    assert float(made.min()) >= 0 and float(made.max()) <= 255.0001
    torch.testing.assert_close(pool(made[None])[0], low, atol=1e-4, rtol=0)
    assert not made[:, :, :2].any() and (made[:, :, 6:] == 255).all()
    inside = high[:, :, 2:4] - upsample(pool(high[None]))[0, :, :, 2:4] + 100
    torch.testing.assert_close(made[:, :, 2:4], inside)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 17), (16, 16), (33, 20), (12, 61)])
def test_any_size_is_doubled_the_same_in_any_batch(height: int, width: int) -> None:
    snapshot, picture = model(), photo(height, width)
    made = upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(num_steps=2))
    assert made.shape == (2 * height, 2 * width, 3) and made.dtype == np.uint8
    alone = upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(num_steps=2, batch_size=1))
    assert np.abs(made.astype(int) - alone).max() <= 1
    np.testing.assert_array_equal(made, upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(num_steps=2)))
    if height * width > 1:
        assert (made != upscale(snapshot, picture, NOTHING, 1, UpscaleSettings(num_steps=2))).any()


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "sde_dpmpp_2m"])
def test_every_sampler_leaves_the_low_band_at_its_level(sampler: str) -> None:
    snapshot = model()
    shell = shells_for(snapshot, 2)[0]
    low = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    text = NOTHING.select(torch.zeros(2, dtype=torch.int64))
    asked: list[str] = []

    def draw(purpose: str, px: int) -> torch.Tensor:
        asked.append(purpose)
        return torch.stack([noise_window(i, purpose, 0, 0, px) for i in range(2)])

    made = add_high_band(shell, low, text, karras_sigmas(3, 1.4, 0.002), 0.1, sampler, draw)
    below = shell.below.estimate(low + 0.1 * draw("low", 16), torch.full((2,), 0.1), text).denoised
    torch.testing.assert_close(pool(made), below, atol=1e-5, rtol=1e-4)
    assert asked[:2] == ["low", "high"] and ("step-0" in asked) == (sampler == "sde_dpmpp_2m")


def test_progress_counts_the_rows_of_all_shells() -> None:
    seen: list[tuple[int, int]] = []
    upscale(model(), photo(20, 8), NOTHING, 0, UpscaleSettings(4, 1), lambda *progress: seen.append(progress))
    assert seen == [(row, 5) for row in range(1, 6)]  # 2 rows, then 3


def test_the_finest_shells_upscale() -> None:
    two = model(shells=3)
    assert [shell.resolution for shell in shells_for(two, 4)] == [64, 128]
    assert [shell.resolution for shell in shells_for(two, 2)] == [128]
    assert [shell.resolution for shell in shells_for(model(), 4)] == [32, 32]


def test_a_shell_that_was_not_trained_for_low_bands_of_other_levels_still_upscales() -> None:
    snapshot, picture = model(), photo(16, 16)
    trained = upscale(snapshot, picture, NOTHING, 0)
    snapshot.denoiser.net.bands = False
    untrained = upscale(snapshot, picture, NOTHING, 0)
    assert untrained.shape == trained.shape and (untrained != trained).any()


def test_a_core_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="E-CFG-050 upscale: a core alone"):
        shells_for(model(shells=0), 2)


# --- Refined models.


def refined(upscale_steps: int | None = 1) -> Snapshot:
    """As `model`, refined, with this record of how it upscales."""
    snapshot = model(kind="refined")
    return snapshot._replace(config=replace(snapshot.config, upscale_steps=upscale_steps))


def made_by(
    snapshot: Snapshot, num_steps: int | None = None, picture: np.ndarray | None = None
) -> np.ndarray:
    picture = photo(21, 50) if picture is None else picture
    return upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(num_steps=num_steps))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("factor", [2, 4])
def test_a_refined_shell_adds_detail_around_the_picture_itself(factor: int, project: bool) -> None:
    picture = (photo(21, 50) / 255 * 55 + 100).astype(np.uint8)  # grey, so that nothing leaves the range
    made = upscale(refined(), picture, NOTHING, 0, UpscaleSettings(factor, project=project))
    boxes = made.reshape(21, factor, 50, factor, 3).astype(float)
    assert np.abs(boxes.mean((1, 3)) - picture).max() <= 1
    assert boxes.std((1, 3)).mean() > 2, "there is detail"


def test_the_one_step_of_a_refined_shell_is_that_of_generation() -> None:
    """Around the same estimate of the level below a shell is called as `few_step` calls it."""
    shell = shells_for(refined(), 2)[0]
    text = NOTHING.select(torch.zeros(2, dtype=torch.int64))
    noise = {px: torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(px)) for px in (16, 32)}
    start = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    low, generated = few_step(shell, text, lambda _, px: noise[px], 1, 0.2, start)
    top = HANDOVER * shell.sigma_high_band

    def draw(purpose: str, px: int) -> torch.Tensor:
        return (start - low) / 0.2 if purpose == "low" else noise[px]

    made = add_high_band_at_once(shell, low, text, top, 0.2, draw)
    torch.testing.assert_close(made, generated, atol=1e-4, rtol=1e-4)


def test_a_refined_model_upscales_in_the_steps_of_its_record_unless_told_otherwise() -> None:
    for recorded, other in ((1, 8), (8, 1)):
        by_default = made_by(refined(recorded))
        np.testing.assert_array_equal(by_default, made_by(refined(None), recorded))
        assert (by_default != made_by(refined(recorded), other)).any()
    np.testing.assert_array_equal(made_by(model()), made_by(model(), 8))


def test_a_refined_model_without_a_record_is_refused_unless_steps_are_given() -> None:
    with pytest.raises(ConfigError, match="E-CFG-050 upscale: this refined model .* or give the steps"):
        made_by(refined(None))


def test_a_refined_model_doubles_tiles_the_same_in_any_batch_and_every_time() -> None:
    snapshot, picture = refined(), photo(33, 61)
    made = made_by(snapshot, picture=picture)
    np.testing.assert_array_equal(made, made_by(snapshot, picture=picture))
    alone = upscale(snapshot, picture, NOTHING, 0, UpscaleSettings(batch_size=1))
    assert np.abs(made.astype(int) - alone).max() <= 1
