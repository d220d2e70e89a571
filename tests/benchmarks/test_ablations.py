"""Ablations: networks are built as they are named, and the statistics are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML
from scipy import stats

from benchmarks.ablations import gpu, run, table
from tests.conftest import write_prepared
from tests.test_imports import closure, deps_of, files_below

ROOT = Path(__file__).parents[2]
JUDGING = ("benchmarks/judging.py", "pipeline/evaluation/", "pipeline/adversarial/")  # not for training
PLAN = run.yaml_of(ROOT / run.FOLDER / "params.yaml")


def test_every_network_and_row_is_a_stage_and_has_a_description() -> None:
    with Repo(str(ROOT / run.FOLDER)) as repo:
        stages = repo.index.stages
    seeds = len(PLAN["seeds"])
    assert len(stages) == seeds * (2 * len(PLAN["networks"]) + len(PLAN["rows"]))
    names = [each["name"] for each in (*PLAN["networks"], *PLAN["rows"])]
    assert set(names) == set(table.WHAT) and len(set(names)) == len(names)
    assert set(table.AGAINST) | set(table.AGAINST.values()) == {row["name"] for row in PLAN["rows"]}
    assert {row["network"] for row in PLAN["rows"]} == {network["name"] for network in PLAN["networks"]}


def test_stages_depend_on_the_code_that_they_run() -> None:
    code = closure(f"{run.FOLDER}/run.py")
    for stage in ("train", "sample", "inspect"):
        named = deps_of(stage, ROOT / run.FOLDER / "dvc.yaml")
        needed = {path for path in code if stage != "train" or not path.startswith(JUDGING)}
        assert needed <= files_below(named), f"missing in dvc.yaml, {stage}"
        assert all(needed & files_below([path]) for path in named), f"not needed in dvc.yaml, {stage}"


def test_rows_that_are_compared_have_equal_numbers_of_steps() -> None:
    steps = {row["name"]: len(row["steps"]) for row in PLAN["rows"]}
    assert all(steps[ours] == steps[base] for ours, base in table.AGAINST.items())


def test_overrides_are_yaml_and_only_of_known_keys() -> None:
    assert run.overridden({"core": {"kernels": "off"}}, ["core.kernels=both"]) == {
        "core": {"kernels": "both"}
    }
    with pytest.raises(AssertionError, match="no core.kernel"):
        run.overridden({"core": {"kernels": "off"}}, ["core.kernel=both"])


def test_paired_differences_have_students_interval() -> None:
    ours, base = {0: 1.0, 1: 2.5, 2: 3.0, 7: 9.0}, {0: 0.5, 1: 1.0, 2: 2.0}
    difference = table.paired(ours, base)
    d = np.array([0.5, 1.5, 1.0])
    low, high = stats.t.interval(0.95, 2, d.mean(), stats.sem(d))
    assert (difference.mean - difference.half, difference.mean + difference.half) == pytest.approx(
        (low, high)
    )
    assert difference.p == pytest.approx(stats.ttest_rel([1.0, 2.5, 3.0], [0.5, 1.0, 2.0]).pvalue)
    assert table.paired({0: 1.0}, base) is None


def test_holm_stops_at_the_first_that_fails() -> None:
    assert table.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert table.holm([]) == []


def test_the_page_shows_the_results(tmp_path, monkeypatch) -> None:
    results = tmp_path / run.FOLDER / "results"
    results.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for seed in (0, 1, 2):
        for i, network in enumerate(PLAN["networks"]):
            error = 1.0 + i + 0.001 * rng.random()
            numbers = {"images": 62, "error": error, "plain": error, "medium": error, "fine": error}
            (results / f"{network['name']}-{seed}.json").write_text(json.dumps(numbers))
        for row in PLAN["rows"]:
            runs = [{"steps": n, "nfe": n, **dict.fromkeys(table.METRICS, 1.0 / n)} for n in row["steps"]]
            (results / f"{row['name']}-{seed}.json").write_text(json.dumps({"runs": runs}))
    from PIL import Image

    for row in PLAN["rows"]:
        Image.new("RGB", (80, 20)).save(results / f"{row['name']}-0.png")
    (tmp_path / run.FOLDER / "params.yaml").write_text((ROOT / run.FOLDER / "params.yaml").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/ablations.md").write_text("before\n<!-- tables -->\nstale words\n<!-- end -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    table.main()
    page = (tmp_path / "docs/ablations.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "stale words" not in page
    assert "**+1 ±" in page  # the second network is worse by one, in every seed
    assert (tmp_path / "docs/ablations.png").is_file() and (tmp_path / "docs/ablations-samples.png").is_file()


def test_the_rows_of_a_gpu_are_trained_and_then_judged(tiny_tree, tmp_path, monkeypatch) -> None:
    write_prepared(tmp_path / "data/prepared", count=192)
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline")
    folder = tmp_path / run.FOLDER
    folder.mkdir(parents=True)
    for name in ("run.py", "dvc.yaml"):
        shutil.copy(ROOT / run.FOLDER / name, folder)
    with open(tmp_path / "params.yaml", "w") as file:
        YAML().dump(tiny_tree, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "SIZE", ())
    monkeypatch.setitem(gpu.NETWORKS, "small-kernels_noise", ())  # a core of 8 px has none
    monkeypatch.setattr(gpu, "RECIPE", ("pretrain.batch_size=4", "pretrain.shards=1"))
    monkeypatch.setattr(gpu, "ROWS", {row: (of, sampler, (2,)) for row, (of, sampler, _) in gpu.ROWS.items()})
    monkeypatch.setattr(run, "REPEATS", 3)
    monkeypatch.setattr(run, "SHOWN", 2)
    for network in gpu.NETWORKS:
        gpu.train(network, 0, 8, [])
    gpu.judge()
    for row in gpu.ROWS:
        result = json.loads((folder / "results" / f"{row}-0.json").read_text())
        assert [r["steps"] for r in result["runs"]] == [2] and np.isfinite(result["runs"][0]["kid_lite2"])
    errors = [json.loads((folder / "results" / f"{n}-0.json").read_text())["error"] for n in gpu.NETWORKS]
    assert all(np.isfinite(errors)) and {of for of, _, _ in gpu.ROWS.values()} == set(gpu.NETWORKS)
