"""The denoisers: what holds before any training, preconditioning by hand, exactness of growth."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.conditioning import Conditioning, NoiseConditioning
from pipeline.models.denoiser import SIGMA_DATA, CoreDenoiser, ShellDenoiser, build_core, build_shell
from pipeline.models.layers import (
    Block,
    MPConv,
    mp_cat,
    mp_silu,
    mp_sum,
    renormalize_,
    tangent_gradient_,
    unit_rms,
)
from pipeline.models.resample import high_pass, pool, upsample
from tests.builders import CORE, SHELL, captions, open_gains


@pytest.fixture
def core() -> CoreDenoiser:
    torch.manual_seed(0)
    return open_gains(build_core(16, 8, CORE))


def test_an_untrained_core_is_the_exact_denoiser_of_gaussian_data() -> None:
    core = build_core(16, 8, CORE)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 4.0])
    wiener = x * (0.25 / (0.25 + sigma**2))[:, None, None, None]
    torch.testing.assert_close(core(x, sigma, captions(2)), wiener)


def test_preconditioning_equals_the_numbers_of_the_paper(core: CoreDenoiser) -> None:
    x, sigma = torch.randn(1, 3, 16, 16), torch.tensor([2.0])
    c_in, c_skip, c_out = 1 / math.sqrt(4.25), 0.25 / 4.25, 2 * 0.5 / math.sqrt(4.25)
    out, _ = core.net(c_in * x, torch.tensor([math.log(2) / 4]), captions(1))
    torch.testing.assert_close(core(x, sigma, captions(1)), c_skip * x + c_out * out)


def test_a_new_shell_is_the_upsampled_core_plus_the_wiener_filter_of_the_high_band(
    core: CoreDenoiser,
) -> None:
    shell = build_shell(core, 8, 0.04, SHELL)
    z, sigma, text = torch.randn(2, 3, 32, 32), torch.tensor([0.2, 1.5]), captions(2)
    gain = (0.04 / (0.04 + sigma**2))[:, None, None, None]
    expected = upsample(core(pool(z), sigma / 2, text)) + high_pass(gain * z)
    assert torch.equal(shell(z, sigma, text), expected)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_trained_shell_never_changes_the_low_band(core: CoreDenoiser, patch: int) -> None:
    shell = build_shell(core, 8, 0.04, {"patch": patch, "channels": 8, "num_blocks": 1})
    open_gains(shell.net)
    z, sigma, text = torch.randn(2, 3, 32, 32), torch.tensor([0.2, 1.5]), captions(2)
    estimate = shell(z, sigma, text)
    torch.testing.assert_close(pool(estimate), core(pool(z), sigma / 2, text), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(high_pass(estimate), high_pass(z) * 0, atol=1e-3)


@pytest.mark.parametrize("octaves", [2, 3])
def test_new_shells_nest_into_a_working_generator_before_their_first_step(
    core: CoreDenoiser, octaves: int
) -> None:
    """Each is the model below, enlarged, plus the Wiener filter of its own high band."""
    options = SHELL
    model: CoreDenoiser | ShellDenoiser = core
    z, sigma, text = torch.randn(1, 3, 16 * 2**octaves, 16 * 2**octaves), torch.tensor([1.5]), captions(1)
    noisy = [z]
    for _ in range(octaves):
        noisy.insert(0, pool(noisy[0]))
    expected = core(noisy[0], sigma / 2**octaves, text)
    for i in range(1, octaves + 1):
        v, s = 0.04 / i, sigma / 2 ** (octaves - i)
        model = build_shell(model, 8, v, options)
        expected = upsample(expected) + high_pass((v / (v + s**2))[:, None, None, None] * noisy[i])
    assert model.resolution == z.shape[-1]
    assert torch.equal(model(z, sigma, text), expected)


def test_the_loss_of_a_shell_reaches_the_levels_below_only_if_they_train_jointly(core: CoreDenoiser) -> None:
    options = SHELL
    middle = build_shell(core, 8, 0.04, options)
    top = build_shell(middle, 8, 0.02, options)
    for level in (middle, top):
        open_gains(level.net)
    x, text = torch.randn(1, 3, 64, 64), captions(1)

    def reached() -> list[bool]:
        top.zero_grad()
        top.error(x, x + torch.randn(x.shape), torch.ones(1), text).sum().backward()
        own = (core.net.conv_out.weight, middle.net.conv_out.weight, top.net.conv_out.weight)
        return [weight.grad is not None and bool(weight.grad.any()) for weight in own]

    assert reached() == [False, False, True]
    middle.joint = top.joint = True
    assert reached() == [True, True, True]


def test_gradients_agree_with_finite_differences_in_float64() -> None:
    torch.manual_seed(1)
    core = build_core(16, 8, CORE).double()
    open_gains(core)
    core.dtype = torch.float64
    text = Conditioning(*(t.double() if t.is_floating_point() else t for t in captions(1)[:3]))
    x, sigma = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    weight = core.net.conv_out.weight
    direction = torch.randn_like(weight)
    core.error(x, x * 1.1, sigma, text).sum().backward()
    assert weight.grad is not None
    analytic, step = float((weight.grad * direction).sum()), 1e-2
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step * direction
            values.append(float(core.error(x, x * 1.1, sigma, text)))
    # Norms and embeddings are float32 at all times, which bounds the agreement.
    assert analytic == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)


def test_captions_matter_and_missing_ones_are_all_alike(core: CoreDenoiser) -> None:
    x, sigma = torch.randn(1, 3, 16, 16), torch.ones(1)
    with_text, without = core(x, sigma, captions(1)), core(x, sigma, captions(1, known=False))
    assert not torch.allclose(with_text, without)
    other = captions(1, known=False)._replace(pooled=torch.randn(1, 8))
    torch.testing.assert_close(core(x, sigma, other), without)


def test_padding_tokens_do_not_matter(core: CoreDenoiser) -> None:
    x, sigma, text = torch.randn(1, 3, 16, 16), torch.ones(1), captions(1)
    mask = torch.tensor([[True, True, False]])
    changed = text.tokens.clone()
    changed[:, 2] += 5
    a = core(x, sigma, text._replace(mask=mask))
    torch.testing.assert_close(a, core(x, sigma, Conditioning(text.pooled, changed, mask)))


def test_layers_preserve_magnitude() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, 8, 8, generator=g) for _ in range(2))
    torch.manual_seed(0)
    for out in (
        MPConv(64, 64, 3)(a).detach()[..., 1:-1, 1:-1],
        mp_silu(a),
        mp_sum(a, b, 0.3),
        mp_cat(a, b[:, :16]),
    ):
        assert float(out.square().mean()) == pytest.approx(1, abs=0.06)
    assert float(unit_rms(3 * a, 1).square().mean()) == pytest.approx(1, abs=1e-4)


def test_a_zero_vector_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    unit_rms(x, 1).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_a_step_is_that_of_a_layer_which_divides_by_its_norm() -> None:
    """Renormalising outside of forward, with the gradient projected: the same outputs and gradients."""
    layer, x = MPConv(8, 4, 3), torch.randn(2, 8, 5, 5)
    weight = layer.weight.detach().clone().requires_grad_()
    norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    expected = torch.nn.functional.conv2d(x, weight / norm, padding=1)
    torch.testing.assert_close(layer(x), expected)
    expected.square().sum().backward()
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    tangent_gradient_(layer.weight.grad.flatten(1), layer.weight.detach().flatten(1))
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flavor", ["enc", "dec"])
def test_a_block_is_what_the_paper_draws(flavor: str) -> None:
    """Factors that layers and sums have taken in: the same as one operation after the other."""
    torch.manual_seed(0)
    block = Block(6, 8, 5, flavor, text_dim=8)
    nn.init.constant_(block.emb_gain, 0.7)
    x, emb, text = torch.randn(3, 6, 4, 4), torch.randn(3, 5), captions(3)
    text = text._replace(mask=torch.tensor([[True, True, False], [False] * 3, [True] * 3]))

    def conv(layer: MPConv | None, x: torch.Tensor) -> torch.Tensor:
        assert layer is not None
        w = layer.weight / torch.linalg.vector_norm(layer.weight.flatten(1), dim=1)[:, None, None, None]
        return F.conv2d(x, w, padding=w.shape[-1] // 2)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (unit_rms(t, dim=1) for t in (q, k, v))  # [B,C,positions], one head
        logits = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(q.shape[1])
        shares = logits.masked_fill(~mask[:, None], -math.inf).softmax(dim=-1)
        return torch.einsum("bqk,bck->bcq", shares, v).view(3, 8, 4, 4)

    own, other = block.self_attention, block.text_attention
    assert own is not None and other is not None
    y = unit_rms(conv(block.conv_skip, x), 1) if flavor == "enc" else x
    expected = y if flavor == "enc" else conv(block.conv_skip, x)
    scale = emb @ (block.emb_linear.weight / math.sqrt(5)).t() * 0.7 + 1
    y = mp_silu(conv(block.conv_res0, mp_silu(y)) * scale[:, :, None, None])
    expected = mp_sum(expected, conv(block.conv_res1, y), 0.3)
    q, k, v = conv(own.qkv, expected).flatten(2).chunk(3, dim=1)
    y = attend(q, k, v, torch.ones(3, 16, dtype=torch.bool))
    expected = mp_sum(expected, conv(own.proj, y), 0.3)
    tokens = unit_rms(torch.cat([other.null.expand(3, -1, -1), text.tokens], dim=1), dim=-1)
    k, v = (tokens @ (other.kv.weight / math.sqrt(8)).t()).transpose(1, 2).chunk(2, dim=1)
    mask = F.pad(text.mask, (1, 0), value=True)
    y = attend(conv(other.q, expected).flatten(2), k, v, mask)
    expected = mp_sum(expected, conv(other.proj, y), 0.3)
    torch.testing.assert_close(
        block(x, NoiseConditioning(emb, torch.zeros(3)), text), expected, atol=1e-5, rtol=1e-4
    )


def test_frozen_filters_are_made_ready_once_and_follow_what_is_loaded() -> None:
    layer, other, x = MPConv(8, 4, 3), MPConv(8, 4, 3), torch.randn(2, 8, 5, 5, requires_grad=True)
    expected, of_other = layer(x), other(x)
    layer.requires_grad_(False)
    ready = layer.filters(torch.float32)
    assert layer.filters(torch.float32) is ready
    assert torch.equal(layer(x), expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected)))
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), of_other)
    layer.double()
    assert layer(x.double()).dtype is torch.float64


def test_renormalised_filters_have_unit_root_mean_square() -> None:
    layer = MPConv(8, 4, 3)
    with torch.no_grad():
        layer.weight *= 3
    renormalize_(layer.weight.data)
    assert layer.weight.square().mean(dim=(1, 2, 3)).tolist() == pytest.approx([1] * 4, abs=1e-5)


def test_high_pass_is_a_projection_that_keeps_three_quarters() -> None:
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(high_pass(high_pass(x)), high_pass(x), atol=1e-6, rtol=1e-5)
    assert float(pool(high_pass(x)).abs().max()) < 1e-6
    assert SIGMA_DATA == 0.5
