"""The three training stages in one process, at tiny size: what they write, and that a resume keeps the bits."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline import artifacts
from pipeline.adversarial.few_step import generate_images
from pipeline.adversarial.random_features import RandomDistance
from pipeline.config.params import parse_params
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.folders import push
from pipeline.errors import Busy, ConfigError, Stopped, StorageError
from pipeline.launch.backup import Backup
from pipeline.launch.continuation import continue_from
from pipeline.launch.worker import WorkerConfig
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.snapshot import load_snapshot, save_snapshot
from pipeline.training import checkpoint
from pipeline.training.denoising import DenoisingSettings, DenoisingStep
from pipeline.training.film import CELL, GAP, MARGIN
from pipeline.training.records import read_records
from pipeline.training.state import Learner, TrainState
from pipeline.workers.choices import (
    Distances,
    describe_passes,
    describe_upscaling,
    flat,
    passes_to_keep,
    steps_to_upscale,
    unflat,
)
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain
from pipeline.workers.refine import refine
from pipeline.workers.settings import level_settings, train_context

WORKERS = {"pretrain": pretrain, "finetune": finetune, "refine": refine}
STAGES = {"pretrain": "core", "finetune": "finetuned", "refine": "refined"}
LENGTHS = {"pretrain": 48, "finetune": 48, "refine": 2 * 48}  # images: refine trains the core, then the whole


def config_of(tree: dict[str, Any], root: Path, run_dir: Path) -> WorkerConfig:
    run_dir.mkdir(parents=True, exist_ok=True)
    return WorkerConfig(parse_params(tree), root, run_dir, precision="float32")


@pytest.fixture(scope="module")
def trained(tiny_tree: dict[str, Any], tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with all three models, trained without a break; runs in root/runs."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_root / "data", root / "data")
    for stage, kind in STAGES.items():
        run_dir = root / "runs" / stage
        WORKERS[stage](config_of(tiny_tree, root, run_dir))
        shutil.copytree(run_dir / "result" / "model", root / "models" / kind)
    return root


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Of the last round that has begun."""
    rounds = sorted(
        run_dir.glob("to-*/checkpoints"), key=lambda path: int(path.parent.name.removeprefix("to-"))
    )
    return artifacts.latest_valid([run_dir / "checkpoints", *rounds][-1], "nimg-")


def last_state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    return load_file(newest / "state.safetensors")


@pytest.mark.parametrize(("stage", "kind"), STAGES.items())
def test_a_stage_leaves_a_verified_model_with_numbers_curves_and_pictures(
    trained: Path, stage: str, kind: str
) -> None:
    result = trained / "runs" / stage / "result"
    artifacts.verify_directory(result)
    snapshot = load_snapshot(result / "model")
    assert snapshot.config.kind == kind
    reports = result / "reports"
    assert (reports / "curves.csv").read_text().startswith("nimg,")
    length = LENGTHS[stage]
    assert len((reports / "curves.csv").read_text().splitlines()) == 1 + length // 8
    assert json.loads((reports / "metrics.json").read_text())["num_images"] == 48
    assert (reports / "samples.png").read_bytes().startswith(b"\x89PNG")
    widths = [Image.open(path).width for path in (reports.parents[1] / "film.png", reports / "film.png")]
    drawn = length // 48
    assert widths == [MARGIN + n * (CELL + GAP) for n in (drawn, drawn + 1)], "and of the finished model"
    records = read_records(trained / "runs" / stage / "progress.jsonl")
    assert max(int(str(record["nimg"])) for record in records) == length
    assert {record["total"] for record in records} == {length}


def test_the_lineage_leads_from_the_refined_model_to_the_data(trained: Path) -> None:
    models = {kind: load_snapshot(trained / "models" / kind) for kind in STAGES.values()}
    assert models["refined"].config.lineage.parent == models["finetuned"].digest
    assert models["finetuned"].config.lineage.parent == models["core"].digest
    data = artifacts.directory_digest(trained / "data/prepared")
    assert {m.config.lineage.data for m in models.values()} == {data}
    validation = artifacts.read_manifest(trained / "data/prepared")["meta"]["validation"]["digest"]
    assert {m.config.lineage.validation for m in models.values()} == {validation}


def test_growing_leaves_the_core_bit_for_bit(trained: Path) -> None:
    core = load_snapshot(trained / "models/core").denoiser.state_dict()
    grown = pyramid_levels(load_snapshot(trained / "models/finetuned").denoiser)[0].state_dict()
    assert all(torch.equal(core[name], grown[name]) for name in core)


@pytest.mark.parametrize(
    ("stage", "stop_at"), [("pretrain", 8), ("pretrain", 32), ("refine", 8), ("refine", 32), ("refine", 80)]
)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    trained: Path,
    tiny_tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    stop_at: int,
) -> None:
    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == stop_at:
            raise KeyboardInterrupt

    config = config_of(tiny_tree, trained, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            WORKERS[stage](config)
    assert (newest_checkpoint(tmp_path / "run") is None) == (stop_at == 8)
    WORKERS[stage](config)
    whole, resumed = last_state(trained / "runs" / stage), last_state(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("model/model.safetensors", "reports/curves.csv", "reports/metrics.json", "reports/film.png"):
        ours, theirs = tmp_path / "run/result" / name, trained / "runs" / stage / "result" / name
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize(
    ("stage", "length", "shared"),
    [
        ("pretrain", "num_images", 32),
        ("finetune", "num_images", 32),
        ("refine", "core_images", 32),
        ("refine", "num_images", 48),  # all of the round before
    ],
)
def test_a_longer_run_goes_on_from_before_the_decay_of_a_shorter_one_with_the_bits_of_one_from_scratch(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path, stage: str, length: str, shared: int
) -> None:
    longer = {**tiny_tree, stage: {**tiny_tree[stage], length: 64}}
    nimg = continue_from(trained / "runs" / stage, tmp_path / "on", tiny_tree[stage], longer[stage])
    assert nimg == shared
    totals = {record["total"] for record in read_records(tmp_path / "on/progress.jsonl")}
    assert totals == {64 if stage != "refine" else 112}
    for name in ("on", "scratch"):
        WORKERS[stage](config_of(longer, trained, tmp_path / name))
    for name in ("model/model.safetensors", "reports/curves.csv", "reports/metrics.json"):
        ours, theirs = (tmp_path / run / "result" / name for run in ("on", "scratch"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    ours, theirs = (last_state(tmp_path / run) for run in ("on", "scratch"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def all_finite(run_dir: Path) -> bool:
    """Whether what a run has stored is finite, its numbers too."""
    stored = [load_file(path) for path in run_dir.rglob("*.safetensors")]
    json.loads((run_dir / "result/reports/metrics.json").read_text(), parse_constant=pytest.fail)
    return all(bool(torch.isfinite(tensor).all()) for tensors in stored for tensor in tensors.values())


def test_data_that_change_stop_the_run_before_a_checkpoint_holds_them(
    tiny_tree: dict[str, Any], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    prepared = tmp_path / "data/prepared"
    config, shard = config_of(tiny_tree, tmp_path, tmp_path / "run"), next(prepared.glob("images-*"))
    content = shard.read_bytes()

    def damage(name: str, nimg: int) -> None:
        if nimg == 16:
            shard.touch()  # the same bytes, which is no change
        if nimg == 24:
            shard.write_bytes(content[:-1] + b"x")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", damage)
        with pytest.raises(Busy, match=f"E-BUSY-180 {shard}: has changed since the stage began"):
            pretrain(replace(config, prepared=artifacts.directory_digest(prepared)))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"nimg-{16:012d}"]
    with pytest.raises(Busy, match=f"E-BUSY-180 {prepared}: has changed"):
        pretrain(replace(config, prepared="of the data before"))


def test_a_batch_that_is_not_finite_costs_its_step_and_is_named_also_when_the_run_is_killed_after_it(
    tiny_tree: dict[str, Any],
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw = DenoisingStep.draw

    def draw_bad(self: DenoisingStep, nimg: int, shard: int) -> Any:
        drawn = draw(self, nimg, shard)
        return drawn._replace(images=drawn.images * math.nan) if (nimg, shard) == (24, 1) else drawn

    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(DenoisingStep, "draw", draw_bad)
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    pretrain(config_of(tiny_tree, tiny_root, runs["whole"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "training at image 24: a step is skipped, 1 in a row (loss nan, error nan, gradient_norm nan)" in line
    )
    assert re.search(r"; batch: (\d+ \([0-9a-f]{12}\), ){3}\d+ \([0-9a-f]{12}\) and 4 more$", line)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config_of(tiny_tree, tiny_root, runs["killed"]))
    # The checkpoint due at 32 is within the row of skipped steps, so the one before it is the last.
    assert max(path.name for path in (runs["killed"] / "checkpoints").iterdir()).endswith("16")
    pretrain(config_of(tiny_tree, tiny_root, runs["killed"]))
    for name in ("model/model.safetensors", "reports/curves.csv", "reports/metrics.json"):
        assert (runs["killed"] / "result" / name).read_bytes() == (
            runs["whole"] / "result" / name
        ).read_bytes()
    metrics = json.loads((runs["whole"] / "result/reports/metrics.json").read_text())
    assert metrics["skipped_steps"] == 1 and all(map(all_finite, runs.values()))


def test_a_model_that_is_not_finite_is_not_exported_and_the_run_goes_on_from_its_checkpoint(
    tiny_tree: dict[str, Any], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(state: TrainState) -> None:
        state.learners["net"].emas["0.05"][3] = math.nan
        state.learners["net"].emas["0.1"][3] = math.inf

    config = config_of(tiny_tree, tiny_root, tmp_path / "run")
    save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *args: (save(*args), spoil(args[1])))
        with pytest.raises(
            StorageError, match=r"E-IO-023 .*are not finite. Fix: run it again: it continues from"
        ):
            pretrain(config)
    assert not (tmp_path / "run/result").exists()
    pretrain(config)
    assert all_finite(tmp_path / "run")


@pytest.mark.parametrize("stage", STAGES)
def test_a_watched_run_ends_with_the_same_bits_and_leaves_its_newest_averages(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    config = replace(config_of(tiny_tree, trained, tmp_path / "run"), watch_images=16)
    WORKERS[stage](config)
    for name in ("model/model.safetensors", "reports/curves.csv", "reports/metrics.json"):
        ours, theirs = tmp_path / "run/result" / name, trained / "runs" / stage / "result" / name
        assert ours.read_bytes() == theirs.read_bytes(), name
    watched = [tmp_path / f"run/watch/nimg-{LENGTHS[stage] - back:012d}" for back in (16, 0)]
    assert sorted((tmp_path / "run/watch").iterdir()) == watched
    state = last_state(tmp_path / "run")
    snapshot = load_snapshot(watched[-1])
    assert snapshot.config.kind == STAGES[stage]
    own = snapshot.denoiser.requires_grad_()
    if stage == "finetune":
        pyramid_levels(own)[0].requires_grad_(False)
    averaged = state["generator.ema.ema" if stage == "refine" else "net.ema.0.05"]
    learner = Learner(own, (0.9, 0.99))
    with learner.using(averaged):
        ours = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    loaded = load_snapshot(watched[-1]).denoiser.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("stage", ["pretrain", "refine"])
def test_data_in_a_store_train_the_same_bits(
    trained: Path, tiny_tree: dict[str, Any], s3: str, tmp_path: Path, stage: str
) -> None:
    config = config_of(tiny_tree, trained, tmp_path / "run")
    url = push(trained / "data/prepared", f"{s3}/prepared", lambda line: None)
    WORKERS[stage](replace(config, data=url, cache=str(tmp_path / "cache"), cache_gib=0.01))
    ours, theirs = (
        each / "result/model/model.safetensors" for each in (config.run_dir, trained / "runs" / stage)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_that_was_copied_to_a_store_goes_on_from_there_with_the_bits_of_an_unbroken_one(
    trained: Path, tiny_tree: dict[str, Any], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == 40:
            raise Stopped("E-STOP-001", "pretrain", "is taken away", "go on elsewhere")

    lost, run_dir = tmp_path / "lost/run", tmp_path / "new/run"
    config = config_of(tiny_tree, trained, lost)
    with monkeypatch.context() as patch, pytest.raises(Stopped), Backup("pretrain", lost, f"{s3}/runs"):
        patch.setattr("pipeline.training.context.failpoint", stop)
        pretrain(config)
    shutil.rmtree(lost)
    run_dir.mkdir(parents=True)
    assert Backup("pretrain", run_dir, f"{s3}/runs").restore()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"nimg-{32:012d}"]
    pretrain(replace(config, run_dir=run_dir))
    for name in ("model/model.safetensors", "reports/curves.csv", "reports/metrics.json"):
        theirs = trained / "runs/pretrain/result" / name
        assert (run_dir / "result" / name).read_bytes() == theirs.read_bytes()


def test_refine_exports_the_state_of_the_lowest_kernel_distance_where_asked_to(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    # All states are good, and the moments compete.
    chosen = {
        "core_images": 0,
        "select_by": "kid",
        "check_images": 8,
        "min_spread": 0.0,
        "max_caption_error": 100.0,
        "lr": 0.05,
    }
    tree = {**tiny_tree, "refine": {**tiny_tree["refine"], **chosen}}
    refine(config_of(tree, trained, tmp_path / "run"))
    records = [r["metrics"] for r in read_records(tmp_path / "run/progress.jsonl")]
    scores = [metrics["score"] for metrics in records if "score" in metrics]  # type: ignore[operator,index]
    assert len(scores) == 7
    metrics = json.loads((tmp_path / "run/result/reports/metrics.json").read_text())
    assert (metrics["score"], metrics["best_nimg"]) == (min(scores), 8 * scores.index(min(scores)))
    dataset = PreparedDataset(trained / "data/prepared")
    rows = dataset.split("train")
    checked = [int(rows[i * len(rows) // 8]) for i in range(8)]
    text = dataset.text([dataset.caption_of(row) for row in checked])
    best = load_snapshot(tmp_path / "run/result/model")
    images = generate_images(best, text, range(8), passes=1).images
    assert RandomDistance(dataset.images(rows))(images) == pytest.approx(min(scores), rel=1e-3)


GAINED_NOTHING = {n: Distances(2.0, 2.0) for n in (1, 2)}
WORSE_IN_ONE = {1: Distances(3.0, 2.0), 2: Distances(0.5, 1.0), 4: Distances(0.25, 0.5)}


def test_passes_in_which_nothing_is_gained_are_dropped_and_the_reason_is_said() -> None:
    assert passes_to_keep(WORSE_IN_ONE) == (2, 4)
    assert describe_passes(flat(WORSE_IN_ONE)) == [
        "1 pass: distance 3, before refinement 2; dropped",
        "2 passes: distance 0.5, before refinement 1; kept",
        "4 passes: distance 0.25, before refinement 0.5; kept",
    ]
    assert passes_to_keep(GAINED_NOTHING) == ()
    assert describe_passes(flat(GAINED_NOTHING))[1:] == [
        "2 passes: distance 2, before refinement 2; dropped",
        "nothing was gained: models/refined is the fine-tuned model, unchanged",
    ]
    assert unflat({**flat(WORSE_IN_ONE), "score": 1.0}) == WORSE_IN_ONE


def test_the_refined_model_has_the_passes_that_were_kept_and_its_metrics_say_why(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = json.loads((trained / "runs/refine/result/reports/metrics.json").read_text())
    assert load_snapshot(trained / "models/refined").config.passes == passes_to_keep(unflat(measured))
    assert sorted(unflat(measured)) == [1, 2, 4]

    shutil.copytree(trained / "runs/refine", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/result")
    monkeypatch.setattr("pipeline.workers.refine.compare_passes", lambda *_: WORSE_IN_ONE)
    refine(config_of(tiny_tree, trained, tmp_path / "run"))
    assert load_snapshot(tmp_path / "run/result/model").config.passes == (2, 4)
    metrics = json.loads((tmp_path / "run/result/reports/metrics.json").read_text())
    assert metrics["refined_distance_1"] == 3 and metrics["unrefined_distance_1"] == 2


def test_where_refinement_gains_nothing_the_fine_tuned_model_comes_back_unchanged(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "runs/refine", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/result")
    monkeypatch.setattr("pipeline.workers.refine.compare_passes", lambda *_: GAINED_NOTHING)
    refine(config_of(tiny_tree, trained, tmp_path / "run"))
    kept, parent = load_snapshot(tmp_path / "run/result/model"), load_snapshot(trained / "models/finetuned")
    assert kept.digest == parent.digest and not kept.config.is_refined


def test_a_refined_model_records_the_steps_that_upscaled_best(trained: Path) -> None:
    metrics = json.loads((trained / "runs/refine/result/reports/metrics.json").read_text())
    distances = {n: metrics[f"upscale_distance_{n}"] for n in (0, 1, 8)}
    assert all(value > 0 for value in distances.values())
    best = min(distances, key=lambda n: distances[n])
    assert load_snapshot(trained / "models/refined").config.upscale_steps == (best or None)


@pytest.mark.parametrize(
    ("measured", "steps", "said"),
    [
        ((0.3, 0.1, 0.2), 1, "it upscales in 1"),
        ((0.3, 0.2, 0.1), 8, "it upscales in 8"),
        ((0.1, 0.3, 0.2), None, "models/finetuned upscales better"),
    ],
)
def test_the_choice_of_how_to_upscale_is_said_in_one_line(
    measured: tuple[float, ...], steps: int | None, said: str
) -> None:
    metrics = {f"upscale_distance_{n}": value for n, value in zip((0, 1, 8), measured, strict=True)}
    assert steps_to_upscale({**metrics, "score": 1.0}) == steps
    before, one, eight = measured
    line = f"upscaling: distance in 1 step {one}, in 8 steps {eight}, before refinement {before}; {said}"
    assert describe_upscaling(metrics) == [line]
    assert steps_to_upscale({}) is None and describe_upscaling({}) == []


def test_pictures_do_not_depend_on_the_batch_they_are_made_in(trained: Path) -> None:
    dataset = PreparedDataset(trained / "data/prepared")
    text = dataset.text([0, 1, 2])
    for kind, steps, nfe in (("finetuned", 3, None), ("refined", 1, 1), ("refined", 4, 4)):
        snapshot = load_snapshot(trained / "models" / kind)
        settings = replace(snapshot.config.sampling, num_steps=steps)
        together = generate_images(snapshot, text, [5, 6, 7], settings, steps)
        alone = generate_images(snapshot, text.select(slice(1, 2)), [6], settings, steps)
        assert together.images.shape == (3, 3, 16, 16)
        assert (together.images[1].int() - alone.images[0].int()).abs().max() <= 1  # sums may round apart
        assert nfe is None or together.nfe == nfe


def test_early_weights_are_the_average_of_their_moment_and_guide_what_grows_from_them(
    tiny_tree: dict[str, Any], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    tree = {**tiny_tree, "sampling": {**tiny_tree["sampling"], "guide": "early_weights"}}
    for stage in ("pretrain", "finetune"):
        tree[stage] = {**tree[stage], "early_images": 16, "ema_snapshots": 3}
    config = config_of(tree, tmp_path, tmp_path / "runs/pretrain")

    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == 24:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    then = last_state(tmp_path / "runs/pretrain")  # at 16
    assert torch.equal(then["extra.early"], then["net.ema.0.05"])
    pretrain(config)
    assert torch.equal(last_state(tmp_path / "runs/pretrain")["extra.early"], then["extra.early"])
    shutil.copytree(tmp_path / "runs/pretrain/result/model", tmp_path / "models/core")
    core = load_snapshot(tmp_path / "models/core")
    assert core.early is not None
    early = load_snapshot(tmp_path / "models/core").early
    assert early is not None
    flat = Learner(early.requires_grad_(), (0.9, 0.99)).weights.detach()  # in the order of the state
    torch.testing.assert_close(flat, then["extra.early"], rtol=0.05, atol=0.05)  # but for its projection
    finetune(config_of(tree, tmp_path, tmp_path / "runs/finetune"))
    grown = load_snapshot(tmp_path / "runs/finetune/result/model")
    assert grown.early is not None and grown.config.sampling.guide == "early_weights"
    assert (
        0 < (grown.config.ema_std or 0) < 0.28
        and len(list((tmp_path / "runs/finetune/to-16/averages").iterdir())) == 3
    )
    below = pyramid_levels(grown.early)[0].state_dict()
    assert all(torch.equal(below[name], tensor) for name, tensor in core.early.state_dict().items())
    text = PreparedDataset(tmp_path / "data/prepared").text([0])
    own = replace(grown.config.sampling, num_steps=4, guidance=3.0)
    made = generate_images(grown, text, [1], own).images
    for guide in ("unconditional", "low_band"):
        assert not torch.equal(generate_images(grown, text, [1], replace(own, guide=guide)).images, made)


def test_a_guide_without_weights_is_refused_in_one_line(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    core, text = load_snapshot(trained / "models/core"), PreparedDataset(trained / "data/prepared").text([0])
    with pytest.raises(
        ConfigError, match="guide: 'early_weights' needs weights that this model does not have"
    ):
        generate_images(core, text, [1], replace(core.config.sampling, guide="early_weights"))
    tree = {**tiny_tree, "finetune": {**tiny_tree["finetune"], "early_images": 16}}
    with pytest.raises(ConfigError, match="the model to grow has no early weights"):
        finetune(config_of(tree, trained, tmp_path / "run"))


def test_a_share_of_images_teaches_a_shell_to_upscale(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    more = {"upscale_probability": 0.5, "degrade": {"jpeg": [30, 95], "blur": 1.0}}
    tree = {**tiny_tree, "finetune": {**tiny_tree["finetune"], **more}}
    finetune(config_of(tree, trained, tmp_path / "run"))
    grown = load_snapshot(tmp_path / "run/result/model")
    assert grown.config.shells[0].net["bands"] is True
    gains = [p for name, p in grown.denoiser.net.named_parameters() if "band_" in name and "gain" in name]
    assert len(gains) == 6 and all(float(gain.abs()) > 0 for gain in gains)
    plain = load_snapshot(trained / "models/finetuned")
    assert plain.config.shells[0].net["bands"] is False
    assert not any("band_" in name for name in plain.denoiser.state_dict())


def test_captions_are_dropped_at_the_given_rate(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = load_snapshot(trained / "models/core")
    seen: list[float] = []

    def assess(images: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> Any:
        seen.append(float(text.mask.any(dim=1).float().mean()))
        return sigma, None

    monkeypatch.setattr(snapshot.denoiser, "assess", assess)
    step = DenoisingStep(
        denoiser=snapshot.denoiser,
        batches=Batches(PreparedDataset(trained / "data/prepared"), "train", 0, 64, 1),
        statistics=snapshot.statistics,
        draw_sigma=lambda n, g: torch.rand(n, generator=g) + 0.1,
        settings=DenoisingSettings(
            seed=0, batch_size=64, shards=1, num_images=64, lr=0.01, warmup_images=0, text_dropout=0.25
        ),
    )
    for nimg in range(0, 64 * 16, 64):
        step.shard_loss(nimg, 0)
    assert sum(seen) / len(seen) == pytest.approx(0.75, abs=0.05)


def test_models_with_kernels_and_regions_train_and_grow_only_on_their_like(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    regions = {"probability": 0.5, "maps": "random"}
    tree = {**tiny_tree, "regions": regions, "shell": {**tiny_tree["shell"], "kernels": "both"}}
    with pytest.raises(ConfigError, match="was trained without regions .regions.probability 0"):
        finetune(config_of(tree, trained, tmp_path / "refused"))
    shutil.copytree(trained / "data", tmp_path / "data")
    for stage, kind in STAGES.items():
        config = config_of(tree, tmp_path, tmp_path / "runs" / stage)
        WORKERS[stage](config)
        shutil.copytree(tmp_path / "runs" / stage / "result" / "model", tmp_path / "models" / kind)
    core, grown = (load_snapshot(tmp_path / "models" / kind).denoiser for kind in ("core", "finetuned"))
    for model in (core, grown):
        assert model.difficulty is not None and float(model.difficulty.gain) != 0
    assert all(torch.equal(v, grown.state_dict()[f"below.{k}"]) for k, v in core.state_dict().items())
    assert not (tmp_path / "runs/pretrain/result/reports/kernels.png").exists()  # its maps are too small
    picture = tmp_path / "runs/finetune/result/reports/kernels.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_kernels_no_image_is_looked_at_for_their_picture(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_tree, trained, tmp_path / "run")
    section = config.params.pretrain
    run = train_context("pretrain", config, section, level_settings(config, section))
    monkeypatch.setattr(run, "images_and_text", None)
    run.plot_kernels(load_snapshot(trained / "models/core"), tmp_path / "kernels.png")
    assert not (tmp_path / "kernels.png").exists()


def test_bridges_resume_with_the_bits_of_an_unbroken_run_at_every_level(
    tiny_tree: dict[str, Any], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = {"probability": 0.5, "maps": "bridge"}
    tree = {**tiny_tree, "regions": regions, "core": {**tiny_tree["core"], "dropout": 0.2}}
    tree["finetune"] = {**tiny_tree["finetune"], "core": "joint"}
    shutil.copytree(tiny_root / "data", tmp_path / "data")

    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == 24:  # after a checkpoint at 16
            raise KeyboardInterrupt

    for stage, kind in (("pretrain", "core"), ("finetune", "finetuned")):
        whole, broken = (config_of(tree, tmp_path, tmp_path / f"runs/{stage}{i}") for i in (0, 1))
        WORKERS[stage](whole)
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.training.context.failpoint", stop)
            with pytest.raises(KeyboardInterrupt):
                WORKERS[stage](broken)
        WORKERS[stage](broken)
        models = [config.run_dir / "result/model" for config in (whole, broken)]
        first, second = (model / "model.safetensors" for model in models)
        assert first.read_bytes() == second.read_bytes()
        shutil.copytree(models[0], tmp_path / "models" / kind)


def test_a_model_of_another_size_is_refused_in_one_line(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(tiny_tree, trained, tmp_path / "run")
    with pytest.raises(ConfigError, match="the model to grow makes 16 px, data.resolution is 16"):
        finetune(replace(config, init=trained / "models/finetuned"))


def test_a_model_of_other_shape_or_captions_is_refused_in_one_line_that_says_what_differs(
    trained: Path, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    wider = {**tiny_tree, "core": {**tiny_tree["core"], "channels": 24}}
    with pytest.raises(ConfigError, match=r"core.channels is 16 in the model to grow, 24 in params.yaml"):
        finetune(config_of(wider, trained, tmp_path / "run"))
    finer = {**tiny_tree, "core": {**tiny_tree["core"], "resolution": 16}}
    finer["data"] = {**tiny_tree["data"], "resolution": 32}
    with pytest.raises(ConfigError, match=r"core.resolution is 8 in the model to grow, 16 in params.yaml"):
        finetune(config_of(finer, trained, tmp_path / "run"))
    shutil.copytree(trained / "models/core", tmp_path / "models/core")
    snapshot = load_snapshot(tmp_path / "models/core")
    encoder = {**snapshot.config.text_encoder, "name": "label"}
    save_snapshot(tmp_path / "models/core", snapshot.denoiser, replace(snapshot.config, text_encoder=encoder))
    shutil.copytree(trained / "data", tmp_path / "data")
    with pytest.raises(ConfigError, match="text encoder's name is label in the model, random in the data"):
        finetune(config_of(tiny_tree, tmp_path, tmp_path / "run"))
    varied = {**tiny_tree, "augment": {**tiny_tree["augment"], "probability": 0.5}}
    with pytest.raises(ConfigError, match="was trained without augment .augment.probability 0"):
        finetune(config_of(varied, trained, tmp_path / "run"))
