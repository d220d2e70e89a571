"""One update of a denoiser: what is drawn for it, with maps of levels drawn without images and with bridges."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.diffusion.regions import detail
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import build_core
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for, key
from pipeline.training import denoising
from pipeline.training.denoising import DenoisingSettings, DenoisingStep, set_learning
from pipeline.training.levels import region_maps

NET = {"patch": 1, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.5}
SEED, DROPPED = 3, 0.3


def draw_sigma(batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, 0.0, 1.0, generator)


def step_of(root: Path, bridge: bool) -> DenoisingStep:
    """Random weights everywhere, zero gains included; two shards of 8 images of 8 px, in training mode."""
    torch.manual_seed(0)
    core = build_core(8, 384, {**NET, "regions": True})
    with torch.no_grad():
        for p in core.parameters():
            p += 0.5 * torch.randn(p.shape)
    set_learning(core)
    return DenoisingStep(
        denoiser=core,
        batches=Batches(PreparedDataset(root / "data/prepared"), "train", SEED, 16, 2, 8),
        statistics=Statistics((0.0,) * 3, (0.5,) * 3),
        draw_sigma=draw_sigma,
        draw_maps=region_maps(core, 0.5, 80.0),
        settings=DenoisingSettings(
            seed=SEED,
            batch_size=16,
            shards=2,
            lr=0.01,
            warmup_images=0,
            num_images=64,
            text_dropout=DROPPED,
            bridge=bridge,
        ),
    )


class Given(NamedTuple):
    """What the loss gets, and the state of the stream that dropout draws from."""

    images: Tensor
    sigma: Tensor
    noise: Tensor
    text: Conditioning
    stream: int
    training: bool


def given(root: Path, bridge: bool, monkeypatch: pytest.MonkeyPatch, at: tuple[int, int] = (16, 1)) -> Given:
    seen: list[Given] = []

    def loss(denoiser: Any, *args: Any) -> tuple[Tensor, Tensor]:
        seen.append(Given(*args[:4], torch.initial_seed(), denoiser.training))
        return torch.zeros(1), torch.zeros(1)

    with monkeypatch.context() as patch:
        patch.setattr(denoising, "denoising_loss", loss)
        step_of(root, bridge).shard_loss(*at)
    return seen[0]


def test_random_maps_and_noise_come_from_one_stream_that_sees_no_image(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = given(tiny_root, False, monkeypatch)
    generator = generator_for(SEED, "diffusion", 16, 1)
    draw_maps = region_maps(build_core(8, 384, NET), 0.5, 80.0)
    assert draw_maps is not None
    assert torch.equal(made.sigma, draw_maps(draw_sigma(8, generator), (8, 8), generator))
    assert torch.equal(made.noise, torch.randn(8, 3, 8, 8, generator=generator))
    dropped = torch.rand(8, generator=generator) < DROPPED
    assert torch.equal(made.text.mask.any(dim=1), ~dropped) and dropped.any()
    assert made.stream == key(SEED, "dropout", 16, 1)


def test_a_bridge_changes_nothing_but_the_order_of_levels_and_their_noise(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = (given(tiny_root, bridge, monkeypatch) for bridge in (False, True))
    assert torch.equal(made.images, plain.images) and torch.equal(made.text.mask, plain.text.mask)
    assert made.stream == plain.stream and made.training
    assert torch.equal(made.sigma.flatten(1).sort().values, plain.sigma.flatten(1).sort().values)
    mixed = plain.sigma.flatten(1).std(dim=1) > 0
    assert 0 < int(mixed.sum()) < 8
    assert torch.equal(made.noise[~mixed], plain.noise[~mixed])
    assert not torch.equal(made.sigma[mixed], plain.sigma[mixed])
    kept = made.sigma == made.sigma.amax(dim=(2, 3), keepdim=True)  # the highest patch, which is the start
    pixels = kept.repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(made.noise)
    assert torch.equal(made.noise[pixels], plain.noise[pixels])
    assert not (made.noise[mixed] == plain.noise[mixed]).all()


def test_the_denoiser_arranges_the_levels_by_its_estimate_without_dropout_and_with_the_captions_of_the_loss(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = (given(tiny_root, bridge, monkeypatch) for bridge in (False, True))
    core = step_of(tiny_root, True).denoiser.eval()
    top = plain.sigma.amax(dim=(1, 2, 3))
    with torch.no_grad():
        seen = core(plain.images + top[:, None, None, None] * plain.noise, top, plain.text)
    order = detail(seen, (2, 2)).flatten(1).argsort(dim=1)
    assert (made.sigma.flatten(1).gather(1, order).diff(dim=1) >= 0).all()
    assert len(order.unique(dim=0)) > 1


def test_an_update_is_the_same_whatever_was_drawn_before_and_whoever_has_the_other_shards(
    tiny_root: Path,
) -> None:
    def gradient(before: int) -> Tensor:
        step = step_of(tiny_root, True)
        for i in range(before):  # other shards in this process
            torch.manual_seed(i)
            step.shard_loss(16, 0)
        step.shard_loss(16, 1)[0].backward()
        return torch.cat([p.grad.flatten() for p in step.denoiser.parameters() if p.grad is not None])

    alone = gradient(0)
    assert alone.any() and torch.equal(alone, gradient(2))


def test_a_batch_without_maps_needs_no_bridge(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(tiny_root, True)
    step.draw_maps = region_maps(step.denoiser, 1e-9, 80.0)
    monkeypatch.setattr(denoising, "bridge_maps", None)
    loss, _ = step.shard_loss(0, 0)
    assert torch.isfinite(loss)
