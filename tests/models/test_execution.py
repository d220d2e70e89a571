"""How networks run: activations computed again in the backward pass, one layout, fused attention, one graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.diffusion.loss import denoising_loss
from pipeline.models.denoiser import Denoiser, build_core, build_shell, set_recompute
from pipeline.models.layers import MPConv
from tests.builders import SHELL, no_text, open_gains

NET = {"patch": 1, "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention": [8], "dropout": 0.2}


def model(shell: bool, new: bool) -> Denoiser:
    torch.manual_seed(0)
    more = {"kernels": "both", "regions": True} if new else {}
    built: Denoiser = build_core(32, 8, {**NET, "channel_mult": [1, 2, 2], **more})
    built = build_shell(built, 8, 0.04, {**SHELL, **more}) if shell else built
    return open_gains(built)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("shell", [False, True])
def test_recomputed_activations_give_the_bits_of_kept_ones_dropout_included(shell: bool, new: bool) -> None:
    gradients, saved = [], []
    for recompute in (False, True):
        denoiser = model(shell, new)
        set_recompute(denoiser, recompute)
        g, kept = torch.Generator().manual_seed(1), [0]

        def pack(t: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += t.numel()
            return t

        images, noise = (
            torch.randn(2, 3, denoiser.resolution, denoiser.resolution, generator=g) for _ in range(2)
        )
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss, _ = denoising_loss(denoiser, images, torch.tensor([0.3, 2.0]), noise, no_text(2))
        loss.mean().backward()
        gradients.append({n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None})
        saved.append(kept[0])
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("new", [False, True])
def test_feature_maps_are_channels_last_and_attention_is_fused_forth_and_back(new: bool) -> None:
    denoiser, seen = model(shell=True, new=new), []

    def look(layer: MPConv, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        x = inputs[0]
        if x.ndim == 4 and layer.fan_in > 4:  # not those that read regions
            maps = [x, output]
            output.register_hook(maps.append)
            seen.append(maps)

    for layer in denoiser.modules():
        if isinstance(layer, MPConv):
            layer.register_forward_hook(look)
    x = torch.randn(2, 3, denoiser.resolution, denoiser.resolution)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses what it cannot do
        denoiser(x, torch.tensor([0.3, 2.0]), no_text(2)).square().mean().backward()
    assert len(seen) > 20
    for maps in seen:
        assert len(maps) == 3
        for t in maps:
            known = t.is_contiguous(memory_format=torch.channels_last)
            assert known or t.shape[1] in (3, 12), t.shape  # of images
    assert any(maps[1].shape[1] == 96 for maps in seen)  # queries, keys and values


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shell", [False, True])
def test_a_denoiser_compiles_to_one_graph_that_serves_all_levels(shell: bool, regions: bool) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    denoiser = model(shell, new=regions).eval().requires_grad_(shell)  # frozen ones, too
    compiled = torch.compile(denoiser, fullgraph=True, backend=count)
    x, text = torch.randn(2, 3, denoiser.resolution, denoiser.resolution), no_text(2)
    with torch.no_grad():
        for level in (0.002, 0.3, 5.0, 80.0):
            sigma = torch.tensor([level, 2 * level])
            sigma = sigma[:, None, None, None].expand(-1, 1, 8, 8).clone() if regions else sigma
            torch.testing.assert_close(compiled(level * x, sigma, text), denoiser(level * x, sigma, text))
    assert len(graphs) == 1
