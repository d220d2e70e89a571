"""Averages of any length from stored ones: the algebra by quadrature, the mix beside one that was tracked."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import artifacts
from pipeline.config.params import parse_params
from pipeline.diffusion.ema import Profile, gamma_of_std, mixing_weights, power_decay, profile_product
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.errors import StorageError
from pipeline.launch.worker import WorkerConfig
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import CoreDenoiser, build_core
from pipeline.models.layers import MPConv
from pipeline.models.snapshot import load_snapshot
from pipeline.rng import generator_for
from pipeline.training.averages import Averages
from pipeline.training.schedule import moments_of
from pipeline.training.state import Learner, TrainState
from pipeline.workers import pretrain

BATCH, STEPS = 8, 160
NET = {"patch": 1, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": []}


def config_of(tree: dict[str, Any], root: Path, run_dir: Path) -> WorkerConfig:
    run_dir.mkdir(parents=True)
    return WorkerConfig(parse_params(tree), root, run_dir, precision="float32")


def density(profile: Profile, t: Any) -> Any:
    gamma = gamma_of_std(profile.std)
    inside = (gamma + 1) * (t / profile.nimg) ** gamma / profile.nimg
    return np.where(t <= profile.nimg, inside, 0.0)


def test_products_of_profiles_are_their_integrals() -> None:
    t = (np.arange(400_000) + 0.5) / 400_000 * 500
    profiles = [Profile(0.05, 500), Profile(0.1, 500), Profile(0.1, 300), Profile(0.2, 125)]
    for a in profiles:
        for b in profiles:
            integral = (density(a, t) * density(b, t)).mean() * 500
            assert profile_product(a, b) == pytest.approx(integral, rel=1e-5)


def test_the_mix_of_a_stored_average_is_that_average_alone() -> None:
    stored = [Profile(std, nimg) for nimg in range(100, 1601, 100) for std in (0.05, 0.1)]
    for i, profile in enumerate(stored):
        factors, missed = mixing_weights(stored, profile)
        np.testing.assert_allclose(factors, np.eye(len(stored))[i], atol=1e-9)
        assert missed < 1e-6


def test_what_a_mix_misses_is_the_distance_of_its_profile() -> None:
    stored, wanted = [Profile(0.05, 100), Profile(0.1, 100), Profile(0.1, 60)], Profile(0.14, 100)
    factors, missed = mixing_weights(stored, wanted)
    t = (np.arange(100_000) + 0.5) / 1000
    mix = sum(factor * density(profile, t) for factor, profile in zip(factors, stored, strict=True))
    distance = np.sqrt(((mix - density(wanted, t)) ** 2).mean() / (density(wanted, t) ** 2).mean())
    assert missed == pytest.approx(distance, rel=1e-3) and 0.01 < missed < 0.3


def test_moments_are_updates_evenly_spread_to_the_end() -> None:
    assert moments_of(48, 8, 4) == [16, 24, 40, 48]
    assert moments_of(48, 8, 99) == [8, 16, 24, 32, 40, 48]
    assert moments_of(48, 8, 0) == []


def trained(folder: Path, stds: tuple[float, ...]) -> Averages:
    """A small core, trained for STEPS updates on coloured noise with a decaying rate."""
    torch.manual_seed(0)
    core = build_core(8, 4, NET)
    learner = Learner(core, (0.9, 0.99), {f"{std:g}": partial(power_decay, std) for std in stds})
    state, hook = (
        TrainState({"net": learner}),
        Averages(folder, learner, moments_of(BATCH * STEPS, BATCH, 16)),
    )
    text = Conditioning(torch.zeros(BATCH, 4), torch.zeros(BATCH, 2, 4), torch.zeros(BATCH, 2) > 0)
    for step in range(STEPS):
        g = generator_for(0, "data", state.nimg)
        images = 0.5 * torch.randn(BATCH, 3, 1, 1, generator=g) * torch.ones(1, 1, 8, 8)
        sigma = lognormal_sigma(BATCH, -0.6, 1.4, g)
        noisy = images + sigma[:, None, None, None] * torch.randn(images.shape, generator=g)
        core.error(images, noisy, sigma, text).mean().backward()
        learner.update(0.03 * (1 - step / STEPS), state.nimg, BATCH)
        state.nimg += BATCH
        hook(state, {})
    return hook


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> Averages:
    return trained(tmp_path_factory.mktemp("averages"), (0.05, 0.1))


def test_a_tracked_average_is_mixed_exactly(averages: Averages) -> None:
    for std in (0.05, 0.1):
        torch.testing.assert_close(
            averages.mixed(std), averages.learner.emas[f"{std:g}"], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("std", [0.035, 0.07, 0.14])
def test_an_average_that_was_not_tracked_is_mixed_as_if_it_had_been(
    averages: Averages, std: float, tmp_path: Path
) -> None:
    direct = trained(tmp_path, (std,)).learner.emas[f"{std:g}"]
    apart = float((averages.learner.emas["0.05"] - averages.learner.emas["0.1"]).norm())
    assert float((averages.mixed(std) - direct).norm()) < 0.01 * apart


def test_a_mix_is_projected_before_use(averages: Averages) -> None:
    core = averages.learner.module
    assert isinstance(core, CoreDenoiser)
    with averages.learner.using(averages.mixed(0.14)):
        for layer in core.modules():
            if isinstance(layer, MPConv):
                rms = layer.weight.square().mean(dim=tuple(range(1, layer.weight.ndim))).sqrt()
                torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-4, rtol=0)


def test_candidates_are_the_tracked_lengths_and_those_that_the_stored_ones_determine(
    averages: Averages,
) -> None:
    stds = [std for std, _ in averages.candidates(averages.tracked())]
    assert stds[:2] == [0.05, 0.1] and stds[2:] == sorted(stds[2:])
    assert len(stds) == 2 + 9 and stds[2] == pytest.approx(0.025) and stds[-1] == pytest.approx(0.2)
    few = Averages(averages.folder, averages.learner, averages.moments[-1:])
    stds = [round(std, 3) for std, _ in few.candidates(few.tracked())]
    assert stds == [0.05, 0.1, 0.042, 0.055, 0.071, 0.092, 0.119]


def test_a_run_chooses_by_held_out_error_and_a_resumed_one_chooses_the_same_bits(
    tiny_tree: dict[str, Any], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**tiny_tree, "pretrain": {**tiny_tree["pretrain"], "ema_snapshots": 4, "early_images": 24}}
    whole, broken = (config_of(tree, tiny_root, tmp_path / name) for name in ("whole", "broken"))

    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == 32:  # a moment was stored at 24, the checkpoint is at 32
            raise KeyboardInterrupt

    pretrain.pretrain(whole)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(broken)
    shutil.rmtree(tmp_path / "broken/checkpoints/nimg-000000000032")  # killed before it: 24 is trained again
    pretrain.pretrain(broken)
    for name in (
        *(f"averages/nimg-{nimg:012d}/averages.safetensors" for nimg in (16, 24, 40, 48)),
        *(f"result/model/{name}" for name in ("model.safetensors", "early.safetensors", "config.json")),
        "result/reports/metrics.json",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    assert len(list((tmp_path / "whole/averages").iterdir())) == 4
    plain = config_of(tiny_tree, tiny_root, tmp_path / "plain")
    pretrain.pretrain(plain)
    numbers = {
        name: artifacts.json.loads((tmp_path / name / "result/reports/metrics.json").read_text())
        for name in ("whole", "plain")
    }
    assert numbers["whole"]["held_out_error"] <= numbers["plain"]["held_out_error"]
    chosen = load_snapshot(tmp_path / "whole/result/model").config.ema_std
    assert chosen == numbers["whole"]["ema_std"]
    assert load_snapshot(tmp_path / "plain/result/model").config.ema_std in (0.05, 0.1)


def test_a_moment_that_is_missing_or_damaged_is_named(averages: Averages, tmp_path: Path) -> None:
    shutil.copytree(averages.folder, tmp_path / "copy")
    copy = Averages(tmp_path / "copy", averages.learner, averages.moments)
    file = copy.path(averages.moments[3]) / "averages.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(StorageError, match=file.parent.name):
        copy.mixed(0.07)
    shutil.rmtree(file.parent)
    with pytest.raises(StorageError, match=file.parent.name):
        copy.mixed(0.07)


def test_a_damaged_moment_is_named_and_the_choice_is_made_from_the_others(
    averages: Averages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(averages.folder, tmp_path / "copy")
    copy = Averages(tmp_path / "copy", averages.learner, averages.moments)
    file = copy.path(averages.moments[3]) / "averages.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    stds = [std for std, _ in copy.candidates(copy.tracked())]
    assert stds[:2] == [0.05, 0.1] and len(stds) > 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: E-IO-017 {file}: has ") and "mixed from the others" in line
    shutil.rmtree(copy.path(averages.moments[-1]))  # nothing reaches the end without the last
    assert [std for std, _ in copy.candidates(copy.tracked())] == [0.05, 0.1]
