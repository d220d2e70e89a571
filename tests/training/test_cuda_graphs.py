"""CUDA graphs and compilation: a recorded training step is the step to the bit, a compiled one up to roundings."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.data.dataset import Batch
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.diffusion.regions import region_sigma
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, build_core, build_shell, pyramid_levels, set_dtype
from pipeline.models.statistics import Statistics
from pipeline.rng import generator_for
from pipeline.training.cuda_graphs import WARM_UP, Recorded, cloned, leaves
from pipeline.training.denoising import DenoisingSettings, DenoisingStep
from pipeline.training.state import Learner, TrainState


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None = None


def test_leaves_and_copies_keep_the_order_and_the_kinds() -> None:
    x, y = torch.zeros(2), torch.ones(3)
    tree = (Pair(x), (y, None))
    assert [id(t) for t in leaves(tree)] == [id(x), id(y)]
    copy = cloned(tree)
    assert isinstance(copy[0], Pair) and copy[0].b is None and copy[1][1] is None
    copy[0].a.add_(1)
    assert torch.equal(x, torch.zeros(2)) and torch.equal(copy[1][0], y)


def test_a_recording_is_replayed_on_new_values_in_its_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device: what is recorded is done again, on the tensors that it was recorded with."""
    done: list[int] = []

    def work(pair: Pair, factor: Tensor) -> Tensor:
        done.append(id(pair.a))
        return pair.a * factor

    class Graph:
        def replay(self) -> None:
            assert recorded.static_output is not None
            recorded.static_output.copy_(work(*recorded.static_inputs))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    recorded = Recorded(work)
    made = [recorded(Pair(torch.tensor([float(i)])), torch.tensor(2.0)).clone() for i in range(WARM_UP + 3)]
    assert [float(x) for x in made] == [2.0 * i for i in range(WARM_UP + 3)]
    places = done[WARM_UP:]  # the recording, and three replays
    assert len(places) == 4 and set(places) == {id(recorded.static_inputs[0].a)}


class Noise:
    """Batches of noise, another one for every place."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def at(self, nimg: int, shard: int) -> Batch:
        generator = generator_for(0, "pictures", nimg, shard)
        shape = (4, 3, self.resolution, self.resolution)
        tokens = torch.randn(4, 3, 8, generator=generator)
        mask = torch.rand(4, 3, generator=generator) < 0.7
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return Batch(images, 1, Conditioning(tokens.mean(1), tokens, mask), None)


def trained(
    kind: str, recorded: bool = False, compiled: bool = False, device: str = "cpu"
) -> tuple[Tensor, list[Tensor]]:
    """Weights and losses after some updates, in bfloat16 with dropout."""
    torch.manual_seed(0)
    core, size = {"patch": 2, "channels": 32, "channel_mult": [1, 2], "attention": [8], "dropout": 0.1}, 32
    more = {"regions": True, "kernels": "both"} if kind == "regions" else {}
    net: Denoiser = build_core(size, 8, core | more)
    if kind in ("shell", "joint", "tiles"):
        net = build_shell(net, 8, 0.04, {"patch": 2, "channels": 16})
    if kind == "tiles":
        for width in (16, 8):
            net = build_shell(net, 8, 0.02, {"patch": 2, "channels": width})
    net = net.to(device)
    set_dtype(net, torch.bfloat16)
    if kind == "joint":
        net.joint = True
        own: nn.Module = net
    else:
        for level in pyramid_levels(net)[:-1]:
            level.requires_grad_(False)
        own = nn.ModuleList(m for name, m in net.named_children() if name != "below")
    learner = Learner(own, (0.9, 0.99), {"a": lambda nimg, batch: 0.9})
    state = TrainState({"net": learner})

    def sigma(n: int, generator: torch.Generator) -> Tensor:
        drawn = lognormal_sigma(n, -0.6, 1.6, generator)
        return region_sigma(drawn, (8, 8), 0.5, generator, 80.0) if kind == "regions" else drawn

    step = DenoisingStep(
        denoiser=net,
        batches=Noise(net.resolution),
        statistics=Statistics((0.0,) * 3, (0.6,) * 3),
        draw_sigma=sigma,
        settings=DenoisingSettings(
            seed=0,
            batch_size=8,
            shards=2,
            lr=0.02,
            warmup_images=0,
            num_images=10**6,
            text_dropout=0.2,
            recorded=recorded,
            compiled=compiled,
        ),
    )
    losses = []
    for _ in range(WARM_UP + 3):
        losses.append(step(state)["loss"].clone())
        state.nimg += 8
        if state.nimg == 24:
            net.eval()  # as a look at held-out images does
            with learner.using(learner.emas["a"]), torch.no_grad():
                x = torch.zeros(1, 3, net.resolution, net.resolution, device=device)
                net(x, torch.ones(1, device=device), no_text(device))
    return learner.weights.detach().clone(), losses


def no_text(device: str) -> Conditioning:
    mask = torch.zeros(1, 3, dtype=torch.bool)
    return Conditioning(torch.zeros(1, 8), torch.zeros(1, 3, 8), mask).to(device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regions", "tiles"])
def test_a_compiled_loss_is_one_graph_for_all_updates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time, but not turned into other code, it is the step up to roundings."""
    counted = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    torch._dynamo.reset()
    weights, losses = trained(kind)
    assert counted.frame_count == 0
    same, again = trained(kind, compiled=True)
    assert counted.frame_count == 1
    torch.testing.assert_close(torch.stack(again), torch.stack(losses), rtol=1e-4, atol=0)
    assert float((same - weights).norm() / weights.norm()) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", ["core", "regions", "shell", "joint", "tiles"])
def test_a_recorded_step_gives_the_bits_of_the_step(kind: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        weights, losses = trained(kind, device="cuda")
        same, again = trained(kind, recorded=True, device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert len({float(loss) for loss in losses}) == len(losses)  # other pictures every time
    assert [float(loss) for loss in again] == [float(loss) for loss in losses]
    assert torch.equal(same, weights)
