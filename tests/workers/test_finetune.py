"""Growth by two octaves in one stage, at tiny size: one by one or together, around a core that stays or learns."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import artifacts
from pipeline.config.params import parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import generate
from pipeline.launch.worker import WorkerConfig
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.snapshot import Snapshot, at_resolution, load_snapshot, save_snapshot
from pipeline.training.records import read_records
from pipeline.workers import pretrain
from pipeline.workers.finetune import finetune
from tests.conftest import write_prepared

ORDERS = ("one_by_one", "together")


def config_of(tree: dict[str, Any], root: Path, run_dir: Path, **finetune: Any) -> WorkerConfig:
    run_dir.mkdir(parents=True, exist_ok=True)
    params = parse_params({**tree, "finetune": {**tree["finetune"], **finetune}})
    return WorkerConfig(params, root, run_dir, precision="float32")


@pytest.fixture(scope="module")
def tree(tiny_tree: dict[str, Any]) -> dict[str, Any]:
    """Tiny parameters with two octaves; 24 images a phase, a checkpoint every 16; with dropout."""
    short = {"num_images": 24, "sample_images": 24, "early_images": 8}
    return {
        **tiny_tree,
        "data": {**tiny_tree["data"], "resolution": 32},
        "core": {**tiny_tree["core"], "dropout": 0.1},
        "shell": {**tiny_tree["shell"], "channels": [16, 8]},
        "pretrain": {**tiny_tree["pretrain"], **short},
        "finetune": {**tiny_tree["finetune"], **short},
        "sampling": {**tiny_tree["sampling"], "handover": [8.0, 6.0]},
    }


@pytest.fixture(scope="module")
def base(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with data of 32 px and models/core."""
    root = tmp_path_factory.mktemp("base")
    write_prepared(root / "data/prepared", resolution=32)
    pretrain.pretrain(config_of(tree, root, root / "runs/pretrain"))
    shutil.copytree(root / "runs/pretrain/result/model", root / "models/core")
    return root


@pytest.fixture(scope="module")
def grown(base: Path, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by order, trained without a break around a frozen core."""
    folders = {order: tmp_path_factory.mktemp(order) for order in ORDERS}
    for order, folder in folders.items():
        finetune(config_of(tree, base, folder, order=order))
    return folders


def samples(snapshot: Snapshot, base: Path) -> torch.Tensor:
    text = PreparedDataset(base / "data/prepared").text([0, 1])
    return generate(
        snapshot, text, [3, 4], replace(snapshot.config.sampling, num_steps=4, guidance=1.5)
    ).images


@pytest.mark.parametrize("order", ORDERS)
def test_two_octaves_grow_in_one_stage_with_numbers_curves_and_pictures_of_each(
    order: str, grown: dict[str, Path], base: Path
) -> None:
    result = grown[order] / "result"
    artifacts.verify_directory(result)
    snapshot, core = load_snapshot(result / "model"), load_snapshot(base / "models/core")
    assert [level.resolution for level in pyramid_levels(snapshot.denoiser)] == [8, 16, 32]
    assert [shell.net["channels"] for shell in snapshot.config.shells] == [16, 8]
    assert snapshot.config.lineage.init_sha256 == core.digest
    numbers = json.loads((result / "reports/metrics.json").read_text())
    records = read_records(grown[order] / "progress.jsonl")
    total = 48 if order == "one_by_one" else 24
    assert {record["total"] for record in records} == {total} and records[-1]["nimg"] == total
    for suffix in ("", "_16"):
        assert numbers[f"held_out_error{suffix}"] > 0 and numbers[f"ema_std{suffix}"] in (0.05, 0.1)
        curve = (result / f"reports/curves{suffix}.csv").read_text().splitlines()
        assert curve[0] == f"nimg,loss{suffix},error{suffix}" and len(curve) == 1 + 3
        assert (result / f"reports/samples{suffix}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((grown[order] / "samples").glob("nimg-*.png"))) == total // 24
    assert snapshot.early is not None and core.early is not None
    early = [level.net.state_dict() for level in pyramid_levels(snapshot.early)]
    assert all(torch.equal(early[0][name], tensor) for name, tensor in core.early.net.state_dict().items())
    final = pyramid_levels(snapshot.denoiser)
    assert all(not torch.equal(early[i]["conv_out.weight"], final[i].net.conv_out.weight) for i in (1, 2))


@pytest.mark.parametrize("order", ORDERS)
def test_a_frozen_core_makes_the_same_pictures_bit_for_bit(
    order: str, grown: dict[str, Path], base: Path
) -> None:
    core = load_snapshot(base / "models/core")
    inside = at_resolution(load_snapshot(grown[order] / "result/model"), 8)
    assert torch.equal(samples(inside, base), samples(core, base))


@pytest.mark.parametrize(
    ("order", "core"), [("one_by_one", "tuned"), ("together", "tuned"), ("one_by_one", "joint")]
)
def test_a_core_that_learns_changes_in_the_new_model_alone(
    order: str, core: str, tree: dict[str, Any], grown: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    before = load_snapshot(base / "models/core")
    finetune(config_of(tree, base, tmp_path, order=order, core=core))
    after = load_snapshot(tmp_path / "result/model")
    numbers = json.loads((tmp_path / "result/reports/metrics.json").read_text())
    assert {"held_out_error_8", "held_out_error_16", "held_out_error"} <= numbers.keys()
    old, new = before.denoiser.state_dict(), pyramid_levels(after.denoiser)[0].state_dict()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert not torch.equal(samples(at_resolution(after, 8), base), samples(before, base))
    assert load_snapshot(base / "models/core").digest == before.digest


@pytest.mark.parametrize(
    ("order", "core", "stop_at"),
    [
        ("one_by_one", "frozen", 40),
        ("one_by_one", "tuned", 40),
        ("one_by_one", "frozen", 24),
        ("together", "joint", 16),
    ],
)
def test_a_run_killed_in_a_later_octave_ends_with_the_bits_of_an_unbroken_one(
    order: str,
    core: str,
    stop_at: int,
    tree: dict[str, Any],
    grown: dict[str, Path],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == stop_at:
            raise KeyboardInterrupt

    whole = grown[order]
    if core != "frozen":
        whole = tmp_path / "whole"
        finetune(config_of(tree, base, whole, order=order, core=core))
    config = config_of(tree, base, tmp_path / "run", order=order, core=core)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert (tmp_path / "run/to-16/result").exists() == (order == "one_by_one")
    finetune(config)
    files = [path.relative_to(whole / "result") for path in (whole / "result").rglob("*") if path.is_file()]
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "run/result" / name).read_bytes() == (whole / "result" / name).read_bytes(), name


def test_a_damaged_result_of_an_octave_is_made_again(
    tree: dict[str, Any], grown: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(grown["one_by_one"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/result")
    (tmp_path / "run/to-16/result/model/config.json").write_text("{}")
    finetune(config_of(tree, base, tmp_path / "run"))
    name = "result/model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (grown["one_by_one"] / name).read_bytes()


@pytest.mark.parametrize(("core", "follows"), [("tuned", False), ("joint", True)])
def test_the_shells_move_the_core_only_if_they_train_jointly(
    core: str, follows: bool, tree: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """Shells of another width leave no trace in the weights of a core that learns by its own loss alone."""
    found = []
    for width in (8, 16):
        other = {**tree, "shell": {**tree["shell"], "channels": [width, 8]}}
        run_dir = tmp_path / str(width)
        finetune(config_of(other, base, run_dir, order="together", core=core))
        newest = artifacts.latest_valid(run_dir / "to-32/checkpoints", "nimg-")
        assert newest is not None
        found.append(load_file(newest / "state.safetensors")["net_8.weights"])
    assert torch.equal(*found) != follows


@pytest.mark.parametrize("kind", ["finetuned", "refined"])
def test_a_model_of_two_levels_grows_by_the_octave_that_it_lacks(
    kind: str, tree: dict[str, Any], grown: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    parent = load_snapshot(grown["one_by_one"] / "to-16/result/model")
    config = replace(parent.config, kind=kind, passes=(1,), sigma_start=5.0)
    save_snapshot(tmp_path / "parent", parent.denoiser, config, parent.early and parent.early.state_dict())
    parent = load_snapshot(tmp_path / "parent")
    finetune(replace(config_of(tree, base, tmp_path / "run"), init=tmp_path / "parent"))
    assert [path.name for path in (tmp_path / "run").glob("to-*")] == ["to-32"]
    made = load_snapshot(tmp_path / "run/result/model")
    assert made.config.kind == "finetuned" and not made.config.passes
    assert made.config.lineage.parent == parent.digest
    inside = at_resolution(made, 16).denoiser.state_dict()
    assert all(torch.equal(inside[name], tensor) for name, tensor in parent.denoiser.state_dict().items())
