"""Preconditioning, loss weights and conditioning against numbers worked out by hand; gradients against float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.loss import denoising_loss
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import CoreDenoiser, Denoiser, ShellDenoiser, build_core, build_shell
from pipeline.models.layers import Embedding, TextAttention
from pipeline.models.resample import high_pass, upsample
from tests.builders import CORE, SHELL, captions


def silu(x: float) -> float:
    return x / (1 + math.exp(-x)) / 0.596


# --- Preconditioning.


class Recorder(nn.Module):
    """A raw network that answers 1 everywhere and keeps what it was given."""

    feature_channels = 1
    regions = False

    def forward(self, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        self.given = (x, *rest)
        return torch.ones_like(x), torch.zeros(len(x), 1, 4, 4)


def test_a_core_at_sigma_one_half() -> None:
    """sigma = sigma_data = 1/2: c_skip 1/2, c_out 1/4 sqrt 2, c_in sqrt 2, c_noise ln(1/2)/4, weight 8."""
    net = Recorder()
    core = CoreDenoiser(net, 4)
    noisy, sigma = torch.full((2, 3, 4, 4), 2.0), torch.full((2,), 0.5)
    denoised = core(noisy, sigma, captions(2))
    torch.testing.assert_close(denoised, torch.full_like(noisy, 1.3535534))  # 1/2 * 2 + 0.3535534
    torch.testing.assert_close(net.given[0], torch.full_like(noisy, 2.8284271))
    torch.testing.assert_close(net.given[1], torch.full((2,), -0.1732868))
    images = torch.full_like(noisy, 1.0)
    torch.testing.assert_close(core.error(images, noisy, sigma, captions(2)), torch.full((2,), 1.0))
    # The image is c_skip z, so that 0 is the right answer and 1 is off by 1, in units of c_out: 8 * 0.3535534^2.


def test_a_shell_at_sigma_three_tenths() -> None:
    """v = 0.04, sigma = 0.3: k_skip 0.04/0.13, k_out 0.06/sqrt 0.13, c_in 1/sqrt 0.34, weight 0.13/0.0036."""
    below, net = CoreDenoiser(Recorder(), 4), Recorder()
    shell = ShellDenoiser(below, net, 0.04)
    g = torch.Generator().manual_seed(0)
    noisy, sigma = torch.randn(1, 3, 8, 8, generator=g), torch.full((1,), 0.3)
    denoised = shell(noisy, sigma, captions(1))
    low = below(torch.nn.functional.avg_pool2d(noisy, 2), torch.full((1,), 0.15), captions(1))
    torch.testing.assert_close(denoised, upsample(low) + 0.3076923 * high_pass(noisy))
    torch.testing.assert_close(net.given[0], 1.7149859 * noisy)
    torch.testing.assert_close(net.given[1], 2 * low)  # divided by sigma_data
    torch.testing.assert_close(net.given[3], torch.full((1,), -0.3009932))
    out = (
        torch.tensor([[1.0, -1.0], [0.0, 0.0]]).repeat(4, 4).expand(1, 3, 8, 8)
    )  # a high band, square mean 1/2
    net.forward = lambda *_: (out, torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(shell(noisy, sigma, captions(1)) - denoised, 0.1664101 * out)
    # The residual is k_out out, so that 36.1111 * 0.1664101^2 * 1/2 * 4/3 = 2/3.
    error = shell.error(denoised, noisy, sigma, captions(1))
    torch.testing.assert_close(error, torch.tensor([2 / 3]), rtol=1e-4, atol=0)


def test_the_loss_is_the_error_over_its_expected_size_plus_the_logarithm_of_that() -> None:
    core = CoreDenoiser(Recorder(), 4)
    core.logvar.forward = lambda sigma: torch.full_like(sigma, 0.7)
    images, noise = torch.full((1, 3, 4, 4), 1.5), torch.full((1, 3, 4, 4), 1.0)
    loss, error = denoising_loss(core, images, torch.tensor([0.5]), noise, captions(1))
    # z = 2, D = 1.3535534, error = 8 * 0.1464466^2 = 0.1715729, loss = 0.1715729 / 2.0137527 + 0.7.
    assert float(error) == pytest.approx(0.1715729, rel=1e-5)
    assert float(loss) == pytest.approx(0.7852006, rel=1e-5)


# --- Conditioning.


def by_hand() -> Embedding:
    """Noise features (sqrt 2, -sqrt 2) whatever the level; the first output sees the first input, and so on."""
    embedding = Embedding(2, 2, 2)
    embedding.fourier.freqs.zero_()
    embedding.fourier.phases.copy_(torch.tensor([0.0, math.pi]))
    with torch.no_grad():
        for layer in (embedding.noise, embedding.text):
            layer.weight.copy_(math.sqrt(2) * torch.eye(2))  # filters of unit root mean square
        embedding.null.copy_(torch.tensor([[5.0, -12.0]]))
    return embedding


@pytest.mark.parametrize("known", [True, False])
def test_the_pooled_caption_joins_the_noise_level_or_its_null_does(known: bool) -> None:
    text = Conditioning(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1, 2), torch.tensor([[known]]))
    emb = by_hand()(torch.tensor([0.3]), text)
    # Unit root mean square: (3, 4) / sqrt 12.5, (5, -12) / sqrt 84.5. The sum of two is divided by sqrt 2.
    pooled = (0.8485281, 1.1313708) if known else (0.5439283, -1.3054279)
    expected = [silu((1.4142136 + pooled[0]) / 1.4142136), silu((-1.4142136 + pooled[1]) / 1.4142136)]
    assert emb[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_only_dropped_captions_teach_the_null() -> None:
    embedding, text = by_hand(), captions(3, dim=2)
    for dropped, taught in (([False] * 3, False), ([False, True, False], True)):
        embedding.zero_grad()
        embedding(torch.zeros(3), text.drop_captions(torch.tensor(dropped))).sum().backward()
        assert embedding.null.grad is not None and bool(embedding.null.grad.any()) == taught


def test_a_pixel_attends_to_the_visible_tokens_and_to_the_null() -> None:
    attention = TextAttention(2, 2)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with torch.no_grad():
        attention.q.weight.copy_(math.sqrt(2) * torch.eye(2)[..., None, None])
        attention.kv.weight.copy_(math.sqrt(2) * torch.cat([torch.eye(2), swap]))  # keys, then values
        attention.proj.weight.copy_(math.sqrt(2) * torch.eye(2)[..., None, None])
        attention.null.copy_(torch.tensor([[[0.0, 7.0]]]))
    tokens = torch.tensor([[[3.0, 0.0], [9.0, 9.0]]])
    x = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1)
    # All of unit root mean square: the query (sqrt 2, 0), the keys (0, sqrt 2) of the null and (sqrt 2, 0) of the
    # first token, the values (sqrt 2, 0) and (0, sqrt 2). Logits are 0 and 2 / sqrt 2.
    share = math.exp(math.sqrt(2)) / (1 + math.exp(math.sqrt(2)))  # of the first token
    out = attention(x, Conditioning(torch.zeros(1, 2), tokens, torch.tensor([[True, False]])))
    assert out.flatten().tolist() == pytest.approx(
        [math.sqrt(2) * (1 - share), math.sqrt(2) * share], rel=1e-5
    )
    alone = attention(x, Conditioning(torch.zeros(1, 2), tokens, torch.tensor([[False, False]])))
    assert alone.flatten().tolist() == pytest.approx([math.sqrt(2), 0], abs=1e-6)


# --- Gradients.


def model(kind: str) -> Denoiser:
    torch.manual_seed(1)
    core = build_core(8, 8, CORE)
    denoiser = core if kind == "core" else build_shell(core, 8, 0.04, SHELL)
    for name, p in denoiser.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(p, 0.7)
    return denoiser


def loss_of(denoiser: Denoiser, dtype: torch.dtype) -> Tensor:
    """The training loss at two levels, one row without caption."""
    text = captions(2).drop_captions(torch.tensor([False, True]))
    text = text._replace(pooled=text.pooled.to(dtype), tokens=text.tokens.to(dtype))
    g = torch.Generator().manual_seed(2)
    shape = (2, 3, denoiser.resolution, denoiser.resolution)
    images, noise = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.3, 1.7], dtype=dtype)
    return denoising_loss(denoiser, 0.5 * images, sigma, noise, text)[0].sum()


def gradients(denoiser: Denoiser, dtype: torch.dtype) -> dict[str, Tensor]:
    loss_of(denoiser, dtype).backward()
    return {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["core", "shell"])
def test_the_gradient_of_every_parameter_is_that_of_float64(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 throughout, which itself agrees with finite differences."""
    single = gradients(model(kind), torch.float32)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no detour through float32
    exact = model(kind).double()
    for level in (exact, getattr(exact, "below", exact)):
        level.dtype = torch.float64
    double = gradients(exact, torch.float64)
    trained = {name for name, _ in exact.named_parameters() if not name.startswith("below.")}
    assert single.keys() == double.keys() == trained
    for name in trained:
        assert double[name].dtype == torch.float64 and double[name].any(), name
        difference = (single[name].double() - double[name]).norm() / double[name].norm()
        assert float(difference) < 1e-4, name
    g, step = torch.Generator().manual_seed(3), 1e-4
    parameters = {name: p for name, p in exact.named_parameters() if name in trained}
    along = {name: torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in parameters.items()}
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, p in parameters.items():
                p += sign * step * along[name]
            values.append(float(loss_of(exact, torch.float64)))
    slope = sum(float((double[name] * along[name]).sum()) for name in trained)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)
