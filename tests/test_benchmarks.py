"""Benchmarks at their smallest: every table runs, with the peers that are installed. What is fast is not asked."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks import coarse, measure, samplers, scale, upscale
from benchmarks.data import decode, load, prepare, store, wait
from benchmarks.train import settings, tables
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.pyramid import sample_pyramid
from pipeline.models.denoiser import build_core, build_shell, pyramid_levels
from pipeline.models.resample import high_pass, pool, upsample
from pipeline.models.snapshot import Snapshot
from pipeline.prepare import validation
from tests.conftest import write_prepared


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_runs_take_turns_after_a_round_that_does_not_count():
    heard = []
    runs = {name: lambda name=name: float(heard.append(name) or len(heard)) for name in "ab"}
    assert measure.interleave(runs, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert heard == list("ababab")


def test_a_ratio_is_taken_within_each_round():
    assert measure.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == 2.0
    assert measure.show([90.0, 100.0, 110.0]) == "100 ±10%"


def test_a_table_is_aligned():
    assert measure.table(["a", "bcd"], [["long", "1"]]) == "| a    | bcd |\n| ---- | --: |\n| long |   1 |\n"


def test_what_lacks_a_package_takes_no_part():
    def make():
        import no_such_package  # noqa: F401

    assert measure.build({"there": lambda: 1, "absent": make}) == {"there": 1}


def test_decode_table_has_every_contender():
    text = decode.decode_table(count=3, repeats=1, px=64)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == list(decode.DECODERS)


def test_prepare_table_says_what_is_decoded_again(monkeypatch):
    monkeypatch.setattr(prepare, "Bound", lambda cores: nullcontext(lambda work, *args: work(*args)))
    monkeypatch.setattr(validation, "validate", lambda *_: validation.Report(()))  # which takes seconds
    text = prepare.prepare_table(count=8, repeats=1, px=64, cores=(1,))
    assert "1 decoded" in text
    assert "Pillow, np.save" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_load_table_has_every_contender():
    text = load.load_table(count=128, repeats=1, side=16, seconds=0.001)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == list(load.LOADERS)


def test_wait_table_has_both_denoising_stages():
    text = wait.wait_table(count=24, repeats=1)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == ["pretrain", "finetune"]


def test_store_table_has_every_kind_size_and_codec():
    text = store.store_table(count=1, repeats=1)
    assert len(lines(text)) == 2 + 2 * 2 * len(store.CODECS)


@pytest.mark.parametrize("equal", ["parameters", "multiply-adds"])
def test_step_table_has_every_contender(equal):
    setting = settings.Setting(torch.device("cpu"), torch.float32, 16, 2, seconds=0.001, repeats=1)
    text = tables.step_table(settings.TINY, setting, equal, weigh=False)
    assert [line.split("|")[1].strip() for line in lines(text)[2:]] == list(settings.CONTENDERS)


def test_update_table_has_every_contender():
    setting = settings.Setting(torch.device("cpu"), torch.float32, 16, 2, seconds=0.001, repeats=1)
    names = [line.split("|")[1].strip() for line in lines(tables.update_table(settings.TINY, setting))[2:]]
    assert names[0].startswith(settings.OURS)
    assert names[1:] == list(tables.UPDATES)


def test_structural_similarity_is_that_of_the_paper():
    """By hand: of flat pictures the first factor is left; that of a picture and its negative is negative."""
    flat = np.full((20, 20, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert upscale.ssim(flat, flat + np.uint8(20)) == pytest.approx(expected)
    noise = np.random.default_rng(0).integers(64, 192, (40, 40, 1), dtype=np.uint8).repeat(3, 2)
    assert upscale.ssim(noise, noise) == pytest.approx(1)
    assert -1 < upscale.ssim(noise, 255 - noise) < -0.9
    # Two pictures that are flat but for one pixel in the middle of the only window.
    x, y = (np.full((11, 11, 3), 100, np.uint8) for _ in range(2))
    x[5, 5], y[5, 5] = 200, 150
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = (line[5] / line.sum()) ** 2  # weight of the middle
    mx, my = 100 + 100 * w, 100 + 50 * w
    vx, vy, vxy = (d * (w - w**2) for d in (100**2, 50**2, 100 * 50))
    c2 = (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert upscale.ssim(x, y) == pytest.approx(value)


def test_psnr_is_known_for_one_level():
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert upscale.psnr(flat, flat + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)


@pytest.mark.parametrize("factor", [2, 4])
def test_upscale_table_has_every_method(factor, tmp_path):
    torch.manual_seed(0)
    net = {"patch": 2, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
    shell = {"patch": 2, "channels": 8, "num_blocks": 1, "bands": True}
    denoiser = build_shell(build_core(16, 384, net), 384, 0.01, shell)
    config = {
        "kind": "finetuned",
        "statistics": {"mean": [0.0] * 3, "std": [0.5] * 3},
        "sampling": {"lift": [8.0]},
    }
    write_prepared(tmp_path / "data", resolution=32, low_resolution=16)
    snapshot = Snapshot(denoiser.eval(), config, "")
    data = PreparedDataset(tmp_path / "data")
    text = upscale.quality_table(snapshot, data, 3, tmp_path / "sheet.png", factor)
    names = [line.split("|")[1].strip() for line in lines(text)[2:]]
    off = {row.split("|")[1].strip(): float(row.split("|")[7]) for row in lines(text)[2:]}
    assert off["lanczos, projected"] <= 0.5 * factor and off["crescendo, 8 steps"] <= 0.5 * factor
    assert names == list(upscale.methods(snapshot)) and "3 pictures of 32 px" in text
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def tiny_pyramid() -> Snapshot:
    """A model of 32 px around a core of 16 px."""
    torch.manual_seed(0)
    net = {"patch": 2, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
    denoiser = build_shell(build_core(16, 384, net), 384, 0.01, {"patch": 2, "channels": 8, "num_blocks": 1})
    for name, p in denoiser.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(p, 0.5)
    sampling = {"sampler": "sde_dpmpp_2m", "num_steps": 6, "guidance": 1.5, "guidance_interval": [0.3, 5.0]}
    config = {
        "kind": "finetuned",
        "statistics": {"mean": [0.0] * 3, "std": [0.5] * 3},
        "sampling": sampling | {"lift": [8.0], "finish": False},
    }
    return Snapshot(denoiser.eval().requires_grad_(False), config, "")


def test_the_whole_pyramid_is_the_model_where_it_was_trained_and_a_wiener_filter_above():
    shell = tiny_pyramid().denoiser
    whole = coarse.WholePyramid(shell, 8.0)
    x, text = torch.randn(2, 3, 32, 32), scale.captions("cpu")
    text = text.select(torch.zeros(2, dtype=torch.long))
    sigma = torch.tensor([1.0, 2.0]) * 16 * shell.sigma_high_band
    made, expected = whole(x, sigma, text), shell(x, sigma, text)
    assert torch.equal(made[0], expected[0]) and not torch.equal(made[1], expected[1])
    v = shell.high_band_variance
    low = upsample(shell.below(pool(x), sigma / 2, text))
    torch.testing.assert_close(made[1], (low + v / (v + sigma[1] ** 2) * high_pass(x))[1])


def test_at_full_resolution_pictures_have_the_low_band_that_they_have_coarse_to_fine():
    model, seeds = tiny_pyramid(), [1, 2, 3]
    text = scale.captions("cpu").select(torch.zeros(3, dtype=torch.long))
    (whole, calls), (fine, nfe) = (
        way(model, text, seeds) for way in (coarse.at_full_resolution, coarse.coarse_to_fine)
    )
    assert calls == nfe and not torch.equal(whole, fine)
    inside = [pool(((x > 0) & (x < 255)).float()) == 1 for x in (whole, fine)]  # not clipped
    off = (pool(whole.float()) - pool(fine.float())).abs()[inside[0] & inside[1]]
    assert len(off) > 500 and off.max() < 1  # rounding


def test_samplers_and_guides_are_compared_on_the_same_pictures(tmp_path):
    write_prepared(tmp_path / "data", count=192, resolution=32, low_resolution=16)
    ways = [samplers.Way("sde_dpmpp_2m", 2, guidance=1.0), samplers.Way("heun", 2, "low", 1.5)]
    text = samplers.compare(tiny_pyramid(), PreparedDataset(tmp_path / "data"), 1, ways, tmp_path / "a.png")
    plain, low = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines(text)[2:]]
    assert plain[:3] == ["sde_dpmpp_2m, 2", "none", "2"] and low[:2] == ["heun, 2", "low, 1.5"]
    assert all(np.isfinite(float(cell.rstrip("%"))) for cell in plain[3:] + low[3:])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_ways_to_sample_differ_in_cost_as_their_steps_do(tmp_path):
    write_prepared(tmp_path / "data", resolution=32, low_resolution=16)
    text = coarse.compare(tiny_pyramid(), PreparedDataset(tmp_path / "data"), 3, tmp_path / "out")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines(text)[2:]]
    assert [row[0] for row in rows] == list(coarse.ways(tiny_pyramid()))
    macs = [float(row[2]) for row in rows]
    assert macs[0] > macs[3] >= macs[2] >= macs[1] and rows[0][3] == "1.00x"  # lifts 4, 8, 16
    assert rows[4][6] and not rows[0][6]  # how far finished tiles move pictures
    assert (tmp_path / "out/ways.png").read_bytes().startswith(b"\x89PNG")


TINY = scale.Shape(settings.TINY.core, settings.TINY.shells, settings.TINY.core_resolution)


def test_scale_table_has_every_octave_and_plans_what_takes_too_long():
    rows = [line.split("|")[1:-1] for line in lines(scale.scale_table(TINY, 32, 6, 8.0, 1e-9, repeats=1))[2:]]
    assert [row[0].strip() for row in rows] == ["8", "16", "32"]
    assert [row[1].strip() for row in rows] == ["16", "16", "16"]
    said = [row[-1].strip() for row in rows]
    assert float(said[0]) >= 0 and all(text.startswith("~") for text in said[1:])


def test_scale_counts_the_steps_that_a_picture_takes_at_each_level():
    denoiser = TINY.build(32)
    calls = {level.resolution: 0 for level in pyramid_levels(denoiser)}

    def count(module, *_):
        calls[module.resolution] += 1

    for level in pyramid_levels(denoiser):
        level.register_forward_hook(count)
    sample_pyramid(denoiser, scale.captions("cpu"), [0], 12, 1.0, (0.3, 5.0), 8.0, sampler="dpmpp_2m")
    planned = scale.plan(TINY, 32, 12, 8.0, torch.float32)
    assert planned.steps == list(calls.values()) == scale.steps_at_levels(denoiser, 12, 8.0)
    assert planned.whole > planned.picture > 12 * planned.macs[0]


def test_scale_plans_the_bytes_that_autograd_keeps():
    layer = torch.nn.Linear(4, 8)
    x = torch.randn(2, 4, requires_grad=True)
    assert scale.kept_bytes(lambda: layer(x).exp(), layer) == 4 * (2 * 4 + 2 * 8)


@pytest.mark.parametrize("name", scale.PRESETS)
def test_shells_beyond_a_preset_have_half_the_channels_of_the_one_before(name):
    shape = scale.read_shape(name)
    widths = [shape.shell(octave)["channels"] for octave in range(6)]
    known = len(shape.shells)
    assert widths[:known] == [shell["channels"] for shell in shape.shells]
    assert all(after == max(before // 2, 16) for before, after in pairwise(widths[known - 1 :]))
