"""Quality at equal training time, at its smallest, with the peers that are installed."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.quality import edm2
from benchmarks.quality.__main__ import peer_rows, quality_table, trials_table
from benchmarks.quality.base import Setting, Task
from benchmarks.quality.contest import Candidates, Contest, call_macs
from benchmarks.quality.judge import Judge, difference
from benchmarks.quality.peers import DDPM, DIFFUSERS, EDM2, Edm2
from benchmarks.quality.training import Data, Run, advance, fresh, train
from benchmarks.train.settings import Plan
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.features import randconv
from pipeline.models.layers import MPConv
from tests.benchmarks.tables import lines
from tests.conftest import write_prepared

PLANS = {EDM2: Plan(8, (1, 2), 1), DIFFUSERS: Plan(8, (1, 2), 1), DDPM: Plan(8, (1, 2))}
PACKAGES = {DIFFUSERS: "diffusers", DDPM: "denoising_diffusion_pytorch"}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    write_prepared(tmp_path / "data", count=192, resolution=16)
    return Data(PreparedDataset(tmp_path / "data"), batch=4)


def tiny(name: str, data: Data) -> Run:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return fresh(name, data.task, Setting(PLANS[name], 1e-3))


# --- EDM2's configuration.


def test_activations_have_unit_variance_at_first() -> None:
    torch.manual_seed(0)
    net = edm2.UNet(32, 384, 32, (1, 2, 2), 1)
    seen = []

    def keep(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        seen.append(float(output.std()))

    for block in (*net.encoder, *net.decoder):
        block.register_forward_hook(keep)
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32), torch.randn(8), torch.randn(8, 384))
    assert len(seen) == len(net.encoder) + len(net.decoder)
    assert all(0.8 < each < 1.25 for each in seen)


def test_the_embedding_has_unit_second_moment() -> None:
    torch.manual_seed(0)
    emb = edm2.UNet(16, 384, 64, (1, 4), 1).embed(torch.randn(256), torch.randn(256, 384))
    assert float(emb.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.1)


def test_parameters_are_those_of_the_paper_less_the_classes() -> None:
    with torch.device("meta"):
        net = edm2.UNet(64, 1000, 128, (1, 2, 3, 4), 3)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(125e6, rel=0.01)  # EDM2-XS, table 2


def test_an_untrained_denoiser_is_the_skip_connection() -> None:
    denoiser = edm2.Denoiser(edm2.UNet(16, 384, 8, (1, 2), 1))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0])
    skip = 0.25 / (0.25 + sigma**2)
    torch.testing.assert_close(denoiser(x, sigma, torch.randn(2, 384)), skip[:, None, None, None] * x)


def test_heun_samples_a_gaussian() -> None:
    calls = []

    def exact(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(float(sigma[0]))
        return x * 0.25 / (0.25 + sigma[0] ** 2)

    noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ratio = edm2.heun(exact, noise, 18).std() / noise.std()
    assert len(calls) == 35
    assert float(ratio) == pytest.approx(0.5276, abs=1e-3)  # at 18 steps


def test_the_rate_rises_stays_and_falls() -> None:
    rate = partial(edm2.learning_rate, 1.0)
    assert [rate(0.01), rate(0.02), rate(0.3)] == pytest.approx([0.5, 1, 1])
    assert rate(1.0) == pytest.approx(0.3**0.5)


def test_weights_keep_unit_norm_in_training(data: Data) -> None:
    run = tiny(EDM2, data)
    advance(run, data.stream(), 1e9, 1e-9)
    norms = [
        m.weight.square().mean(dim=tuple(range(1, m.weight.ndim)))
        for m in run.peer.net.modules()
        if isinstance(m, MPConv)
    ]
    torch.testing.assert_close(torch.cat(norms), torch.ones(sum(map(len, norms))), rtol=1e-4, atol=1e-4)


# --- All peers.


@pytest.mark.parametrize("name", PLANS)
def test_a_peer_trains_averages_and_samples(name: str, data: Data) -> None:
    run = tiny(name, data)
    before = {key: value.clone() for key, value in run.peer.net.state_dict().items()}
    advance(run, data.stream(), 1e9, 1e-9)
    advance(run, data.stream(), 1e9, run.seconds + 1e-9)
    assert run.nimg == 8
    after = run.peer.net.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    _, conditions = data.held_out()
    with torch.no_grad(), run.peer.averaged():
        for sample in run.peer.samplers.values():
            first, again, other = (sample(conditions, 7, seed) for seed in (0, 0, 1))
            assert first.shape == (32, 3, 16, 16) and torch.isfinite(first).all()
            assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(value, after[key]) for key, value in run.peer.net.state_dict().items())


@pytest.mark.parametrize("name", PLANS)
def test_calls_are_what_the_samplers_make(name: str, data: Data) -> None:
    run = tiny(name, data)
    net = getattr(run.peer.net, "net", run.peer.net)
    made = []
    net.register_forward_pre_hook(lambda *_: made.append(1))
    _, conditions = data.held_out()
    for sample in run.peer.samplers.values():
        for calls in run.peer.calls[:2]:
            made.clear()
            with torch.no_grad():
                sample(conditions.select(slice(2)), calls, 0)
            assert len(made) == calls
    assert call_macs(run.peer) > 0


@pytest.mark.parametrize("name", PLANS)
def test_a_stopped_training_goes_on_as_if_unbroken(name: str, data: Data, tmp_path: Path) -> None:
    unbroken, stopped = tiny(name, data), tiny(name, data)
    for run in (unbroken, stopped):
        advance(run, data.stream(), 1e9, 1e-9)
    stopped.save(tmp_path / "training.pt")
    resumed = tiny(name, data)
    resumed.load(tmp_path / "training.pt")
    unbroken.seconds = resumed.seconds
    for run in (unbroken, resumed):
        advance(run, data.stream(), 1e9, run.seconds + 1e-9)
    assert unbroken.nimg == resumed.nimg == 8
    with unbroken.peer.averaged(), resumed.peer.averaged():
        weights, others = unbroken.peer.net.state_dict(), resumed.peer.net.state_dict()
        assert all(torch.equal(value, others[key]) for key, value in weights.items())


def test_a_finished_training_is_only_read(data: Data, tmp_path: Path) -> None:
    setting, path = Setting(PLANS[EDM2], 0.01), tmp_path / "training.pt"
    first = train(EDM2, data, setting, 1e-9, path)
    again = train(EDM2, data, setting, 1e-9, path)
    assert first.nimg == again.nimg == 4


def test_the_table_has_all_calls_and_differences(data: Data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Edm2, "calls", (3, 7, 15))
    judge = Judge.build(data.dataset, [randconv(16)], 60)
    candidates = Candidates((PLANS[EDM2], Plan(8, (1, 1), 1)), (0.01, 0.03))
    contest = Contest(EDM2, data, candidates, 1e-9, 1e-9, tmp_path / "edm2", lambda _: None)
    rows = list(peer_rows(contest, judge))
    values = [row.kids["randconv"].value for row in rows]
    assert [row.cells[-2] for row in rows] == ["3", "7", "15"][: len(rows)]
    assert all(later < before for before, later in pairwise(values[:-1]))
    assert len(rows) == 3 or values[-1] >= values[-2]
    text = quality_table(rows, rows[0].kids, [DIFFUSERS])
    assert len(lines(text)) == 3 + len(rows) and "not installed" in text
    assert difference(rows[0].kids["randconv"], rows[0].kids["randconv"]) == "+0.000 [+0.000, +0.000]"
    trials = contest.trials()
    assert len(trials) == 3 and trials == contest.trials()
    assert trials[0].loss == min(trial.loss for trial in trials)
    assert len(lines(trials_table([(EDM2, trial) for trial in trials]))) == 5


def test_norms_of_diffusers_keep_means(data: Data) -> None:
    norm = tiny(DIFFUSERS, data).peer.net.conv_norm_out
    assert norm.num_channels // norm.num_groups == 4


def test_groups_that_training_lacks_count_as_the_first(data: Data) -> None:
    assert data.numbers(range(4)).tolist() == [0, 0, 0, 0]
    assert data.task == Task(16, 384, 1)
