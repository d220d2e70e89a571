"""Learners, averages, random streams, the progress file and checkpoints."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.diffusion.ema import gamma_of_std, halflife_decay, power_decay
from pipeline.errors import StorageError
from pipeline.models.layers import MPConv
from pipeline.rng import generator_for
from pipeline.training import checkpoint
from pipeline.training.distributed import local_shards
from pipeline.training.schedule import due, linear_decay_lr
from pipeline.training.state import Learner, TrainState


def learner(seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    return Learner(nn.Linear(3, 2), (0.9, 0.99), {"a": partial(power_decay, 0.1)})


def steps(own: Learner, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        x = torch.randn(4, 3, generator=generator_for(0, "x", i))
        own.module(x).square().mean().backward()
        own.update(0.01, 4 * i, 4)


def test_a_learner_does_what_adam_does() -> None:
    own = learner()
    torch.manual_seed(0)
    peer = nn.Linear(3, 2)
    adam = torch.optim.Adam(peer.parameters(), lr=0.01, betas=(0.9, 0.99))
    steps(own, 5)
    for i in range(5):
        adam.zero_grad()
        peer(torch.randn(4, 3, generator=generator_for(0, "x", i))).square().mean().backward()
        adam.step()
    for ours, theirs in zip(own.module.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_filters_turn_as_if_each_layer_divided_by_its_norm() -> None:
    """The projection of all layers at once, against differentiating w / ||w|| in every layer."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(MPConv(4, 6, 3), MPConv(6, 6, 1), nn.Conv2d(6, 4, 1), MPConv(4, 4, 3, groups=4), MPConv(4, 2, 3))
    )
    kept = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    own = Learner(module, (0.9, 0.99))
    assert [(w.shape, g.shape) for w, g in own.filters] == [((8, 36),) * 2, ((4, 9),) * 2, ((6, 6),) * 2]
    x = torch.randn(2, 4, 5, 5)
    expected = x
    for name, layer in module.named_children():
        w, bias = kept[f"{name}.weight"], kept.get(f"{name}.bias")
        if isinstance(layer, MPConv):
            w = w / torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)
        groups = getattr(layer, "groups", 1)
        expected = nn.functional.conv2d(expected, w, bias, padding=w.shape[-1] // 2, groups=groups)
    torch.testing.assert_close(module(x), expected)
    expected.square().sum().backward()
    module(x).square().sum().backward()
    own.project_()
    for name, p in module.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, kept[name].grad, atol=1e-4, rtol=1e-4)
    own.update(0.1, 0, 2)
    assert not own.grad.any()
    for name, p in module.named_parameters():
        assert not torch.equal(p, kept[name])
        if isinstance(module[int(name[0])], MPConv):
            rms = p.square().flatten(1).mean(dim=1)
            torch.testing.assert_close(rms, torch.ones_like(rms))


def test_a_saved_and_loaded_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = learner()
    steps(whole, 6)
    first = learner()
    steps(first, 3)
    checkpoint.save(tmp_path, TrainState({"net": first}, nimg=12))
    second = TrainState({"net": learner(seed=9)})
    checkpoint.resume(tmp_path, second)
    assert second.nimg == 12
    steps(second.learners["net"], 3, start=3)
    for name, tensor in TrainState({"net": whole}).tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(StorageError, match="this run has"):
        TrainState({"net": learner()}).load({"net.adam.exp_avg": torch.zeros(3)}, 4, "somewhere")


def test_lent_weights_are_given_back() -> None:
    own = learner()
    before = own.weights.detach().clone()
    with own.using(torch.zeros_like(before)):
        assert float(own.module.weight.detach().abs().sum()) == 0
    assert torch.equal(own.weights, before)


def test_power_averages_have_the_width_they_are_named_after() -> None:
    for std in (0.05, 0.1, 0.2):
        gamma = gamma_of_std(std)
        assert math.sqrt((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3)) == pytest.approx(std, rel=1e-9)
    # The average of the weight "nimg" itself lies at (gamma + 1) / (gamma + 2) of the way.
    mean = 0.0
    for nimg in range(0, 20000, 10):
        decay = power_decay(0.1, nimg, 10)
        mean = decay * mean + (1 - decay) * (nimg + 10)
    gamma = gamma_of_std(0.1)
    assert mean == pytest.approx(20000 * (gamma + 1) / (gamma + 2), rel=0.01)
    assert halflife_decay(100, 10**6, 100) == pytest.approx(0.5)


def test_learning_rates_warm_up_and_decay() -> None:
    assert linear_decay_lr(1.0, 0, 1000, 100) == pytest.approx(0.01)
    assert linear_decay_lr(1.0, 200, 1000, 100) == 1
    assert linear_decay_lr(1.0, 850, 1000, 0) == pytest.approx(0.5)


def test_random_streams_depend_on_every_part_of_the_key() -> None:
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    draws = {float(torch.rand(1, generator=generator_for(*key), dtype=torch.float64)) for key in keys}
    assert len(draws) == 5


def test_shards_are_taken_in_order() -> None:
    assert list(local_shards(3)) == [0, 1, 2]


def test_intervals_are_due_once_each() -> None:
    assert [n for n in range(6, 61, 6) if due(n, 20, 6)] == [24, 42, 60]
