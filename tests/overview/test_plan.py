"""What a rehearsal measures, and how it is carried on to a whole run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compute import ComputeProfile
from pipeline.config.params import Params, parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import StorageError
from pipeline.launch import scratch
from pipeline.launch.endings import recorded_ending, seconds_taken
from pipeline.models.counting import note_gpu_memory
from pipeline.overview import rehearsal as rehearsals
from pipeline.overview.plan import (
    Actual,
    Estimate,
    Row,
    further_seconds,
    lines,
    why_not_rehearsed,
)
from pipeline.overview.rehearsal import (
    Pace,
    Rehearsal,
    extrapolate,
    paces,
    rehearsed_images,
    short,
)
from pipeline.overview.stages import StageState
from pipeline.registry import pins
from pipeline.workers.finetune import growth_rounds
from pipeline.workers.refine import refining_rounds


def records(rounds: list[tuple[float, float]], images: int = 160, batch: int = 8) -> list[dict[str, Any]]:
    """Of rounds with seconds an update, and more seconds after the middle."""
    found, now = [], 100.0
    for i, (update, pause) in enumerate(rounds):
        now += 30  # between rounds
        for nimg in range(batch, images + 1, batch):
            slow = 3 * update if nimg <= 2 * batch else update
            now += slow + (pause if nimg == images // 2 + batch else 0)
            found.append({"nimg": i * images + nimg, "time": now, "metrics": {"loss": 1.0}})
        found.append({"nimg": (i + 1) * images, "time": now + 5, "metrics": {"held_out_error": 1.0}})
    return found


def test_a_pace_is_that_of_updates_without_start_and_pauses() -> None:
    found = paces(records([(0.4, 2.0), (0.8, 6.0)]), images=160, batch=8)
    assert [(p.update, p.pause) for p in found] == [
        (pytest.approx(0.05), pytest.approx(2.0)),
        (pytest.approx(0.1), pytest.approx(6.0)),
    ]


def test_a_rehearsal_is_a_run_that_params_allow(tiny_tree: dict[str, Any], tiny_params: Params) -> None:
    demo = {**tiny_tree, "pretrain": {**tiny_tree["pretrain"], "num_images": 80_000}}
    for tree in (tiny_tree, demo):
        params = parse_params(tree)
        for stage in ("pretrain", "finetune", "refine"):
            section = getattr(params, stage)
            images = rehearsed_images(section)
            assert 2 * section.batch_size <= images <= section.num_images
            changed = parse_params({**tree, stage: {**tree[stage], **short(section, images)}})
            assert getattr(changed, stage).num_images == images
    assert rehearsed_images(parse_params(demo).pretrain) == 64 * 8


def test_pinned_models_are_fetched_from_the_projects_registry(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(pins, "fetch", lambda *args, **_: fetched.append(args[:4]))
    (tmp_path / "data/prepared").mkdir(parents=True)
    pinned = {"finetune": {"init_from": "models:/toy/1", "init_sha256": "a" * 64}}
    pinned["evaluate"] = {"baseline": "models:/toy/2", "baseline_sha256": "b" * 64}
    params = parse_params({**tiny_tree, **{name: {**tiny_tree[name], **own} for name, own in pinned.items()}})
    Rehearsal(tmp_path, tmp_path / "rehearsal", params)
    cache = tmp_path / "rehearsal/runs/init"
    assert fetched == [
        (tmp_path, "models:/toy/1", "a" * 64, cache),
        (tmp_path, "models:/toy/2", "b" * 64, cache),
    ]
    assert paces([], 16, 8) == [], "pretrain extracts the core, and trains nothing"


def test_the_memory_of_a_gpu_is_what_the_worker_noted(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/prepared").mkdir(parents=True)
    rehearsal = Rehearsal(tmp_path, tmp_path / "rehearsal", tiny_params)
    monkeypatch.setattr(scratch, "command", lambda _: [sys.executable, "-c", "pass"])
    for stage in ("pretrain", "evaluate"):
        assert rehearsal._run(stage, {}).gpu_memory is None
        run = rehearsal.folder / "runs" / stage / "0123"
        run.mkdir(parents=True)
        note_gpu_memory(run, "cpu")
        assert not list(run.iterdir())
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 3)
        note_gpu_memory(run, "cuda")
        assert rehearsal._run(stage, {}).gpu_memory == 3


@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        ("os.kill(os.getpid(), 9)", "E-IO-200", "was killed when it held"),
        ("print('E-CFG-001 it is so'); sys.exit(78)", "E-IO-080", "status 78: E-CFG-001 it is so"),
    ],
)
def test_a_rehearsal_that_fails_says_how(
    ends: str, code: str, told: str, tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/prepared").mkdir(parents=True)
    rehearsal = Rehearsal(tmp_path, tmp_path / "rehearsal", tiny_params)
    monkeypatch.setattr(scratch, "command", lambda _: [sys.executable, "-c", f"import os, sys; {ends}"])
    with pytest.raises(StorageError, match=told) as error:
        rehearsal.train("pretrain")
    assert error.value.code == code


def test_a_rehearsal_that_would_take_hours_is_stopped(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/prepared").mkdir(parents=True)
    rehearsal = Rehearsal(tmp_path, tmp_path / "rehearsal", tiny_params)
    run = rehearsal.folder / "runs/pretrain/0123"
    run.mkdir(parents=True)
    (run / "progress.jsonl").write_text(json.dumps({"nimg": 4, "time": 1.0, "metrics": {"loss": 1.0}}))
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setattr(scratch, "command", lambda _: [sys.executable, "-c", stubborn])
    monkeypatch.setattr(rehearsals, "LIMIT", 0.5)
    monkeypatch.setattr(rehearsals, "PATIENCE", 0.1)
    with pytest.raises(
        StorageError, match="E-IO-201 pretrain: .* stopped after .* at 4 images; at this pace"
    ):
        rehearsal.train("pretrain")


def test_what_cannot_be_rehearsed_has_its_reason(tiny_tree: dict[str, Any], tiny_root: Path) -> None:
    params, here = parse_params(tiny_tree), ComputeProfile()
    dataset = PreparedDataset(tiny_root / "data/prepared")
    assert why_not_rehearsed(params, here, dataset) == ""
    assert "dvc repro prepare" in why_not_rehearsed(params, here, None)
    far = ComputeProfile(address="http://head:8265", storage="/shared")
    assert "http://head:8265" in why_not_rehearsed(params, far, dataset)
    tree = {**tiny_tree, "data": {**tiny_tree["data"], "resolution": 32}}
    larger = parse_params({**tree, "shell": {**tree["shell"], "channels": [16, 8]}})
    assert "has 16 px, params.yaml asks for 32" in why_not_rehearsed(larger, here, dataset)


def test_a_whole_run_repeats_updates_and_pauses(tiny_tree: dict[str, Any]) -> None:
    tree = {
        **tiny_tree,
        "data": {**tiny_tree["data"], "resolution": 32},
        "shell": {**tiny_tree["shell"], "channels": [16, 8]},
        "finetune": {**tiny_tree["finetune"], "num_images": 800, "sample_images": 80},
        "refine": {**tiny_tree["refine"], "core_images": 96},
    }
    params = parse_params(tree)
    assert growth_rounds(params, 8) == [[16], [32]]
    assert growth_rounds(params, 16) == [[32]], "a pinned model may have a shell already"
    assert refining_rounds(params) == {8: 96, 32: 48}
    found = [Pace(160, 0.05, 2.0), Pace(160, 0.1, 6.0)]
    assert further_seconds(params, "finetune", found) == pytest.approx(640 * 0.15 + 8 * 8.0)
    found = [Pace(16, 0.05, 2.0), Pace(16, 0.1, 6.0)]
    assert further_seconds(params, "refine", found) == pytest.approx(80 * 0.05 + 32 * 0.1 + 2 * 2.0)


def test_an_evaluation_lies_on_a_line() -> None:
    assert extrapolate([10, 20], [8.0, 13.0], 100) == pytest.approx(53.0)
    assert extrapolate([20, 20], [8.0, 9.0], 100) == 9.0, "as many samples as there are wanted"
    assert extrapolate([10, 20], [9.0, 8.0], 100) == 8.0


def test_a_plan_shows_what_it_knows() -> None:
    rows = [
        Row(StageState("prepare", "fresh"), Estimate("prepare"), Actual(36.0)),
        Row(
            StageState("pretrain", "fresh"),
            Estimate("pretrain", 36800, 1_200_000, 350_000_000, 2 * 10**12, 185.0, 2**31, 2**32),
            Actual(200.0, 5 * 2**30),
        ),
        Row(
            StageState("evaluate", "stale", ("follows pretrain",)),
            Estimate("evaluate", flops=10**12, seconds=100.0, memory=2**30),
        ),
    ]
    profile = ComputeProfile(workers=2, use_gpu=True, price_per_hour=3.6)
    shown = [line.split() for line in lines(rows, profile)]
    assert shown[1] == ["prepare", "fresh", "00:36"]
    assert shown[2] == [
        *("pretrain", "fresh", "36,800", "1.20", "M", "0.350", "2.00e+12", "2.0", "4.0,", "5.0"),
        *("03:05", "03:20", "1.0e+10"),
    ]
    assert shown[3] == [
        *("evaluate", "stale", "1.00e+12", "1.0", "01:40", "1.0e+10", "follows", "pretrain"),
    ]
    assert shown[4] == ["all", "3.00e+12", "2.0", "4.0,", "5.0", "04:45", "1.1e+10"]
    assert " ".join(shown[5]) == "to run: 01:40, 1.00e+12 FLOP, 0.06 GPU-hours, 0.10 at 3.6 an hour"
    assert list(lines(rows[:1], profile))[-1] == "nothing would run"


def test_the_time_of_a_run_adds_up_over_its_processes_until_it_has_a_result(tmp_path: Path) -> None:
    assert seconds_taken(tmp_path) is None
    for _ in range(2):
        with recorded_ending(tmp_path):
            pass
    (tmp_path / "seconds.json").write_text(json.dumps(10.0))
    with recorded_ending(tmp_path):
        (tmp_path / "result").mkdir()
    assert 10 <= (taken := seconds_taken(tmp_path) or 0) < 11
    with recorded_ending(tmp_path):
        pass
    assert seconds_taken(tmp_path) == taken, "exporting a finished run is no work on it"
