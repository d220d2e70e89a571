"""The whole evaluation on small random models: what it writes, that it repeats, and what it refuses."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.params import ExtractorSetting, Params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import BadData, InputMissing
from pipeline.evaluation import conditions, extractors, samples
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.features import Extractor, randconv
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import build_core, build_shell
from pipeline.models.snapshot import save_snapshot
from pipeline.models.statistics import Statistics
from tests.builders import snapshot_config
from tests.conftest import write_prepared

CORE = {"patch": 1, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 2, "channels": 16, "num_blocks": 1}
EVIL = '<script>alert("x")</script> {{7*7}}'


def write_models(root: Path) -> None:
    """Untrained models in models/finetuned and models/refined."""
    torch.manual_seed(0)
    core = build_core(8, 384, CORE)
    whole = build_shell(core, 384, 0.01, SHELL)
    statistics = Statistics((0.4, 0.3, 0.2), (0.6, 0.6, 0.6))
    config = snapshot_config(
        whole, "finetuned", CORE, [SHELL], statistics=statistics, sampling=SamplerSettings(2)
    )
    save_snapshot(root / "models/finetuned", whole, config)
    refined = dataclasses.replace(config, kind="refined", passes=(1, 2, 4), sigma_start=5.0)
    save_snapshot(root / "models/refined", whole, refined)


def other(resolution: int, device: str = "cpu") -> Extractor:
    """In place of EfficientNet, which has its own tests: a second random network."""
    return dataclasses.replace(
        randconv(resolution, seed=1, device=device), name="lite2", related_to_discriminator=True, main=False
    )


def with_budget(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=changes)})


@pytest.fixture(scope="module")
def params(tiny_params: Params) -> Iterator[Params]:
    """Tiny parameters, 51 held-out and 60 training captions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, two threads wait for each other at every tiny layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "lite2", other)
        names = ("randconv", "lite2", "group-cls")
        yield with_budget(
            tiny_params,
            extractors=tuple(ExtractorSetting(name=name, weights="", sha256="") for name in names),
            heldout_captions=128,
            samples_per_caption=2,
            teacher_samples_per_caption=1,
            train_captions=60,
            teacher_train_captions=30,
        )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with 204 training images, 51 held-out ones, and models."""
    root = tmp_path_factory.mktemp("evaluated")
    write_prepared(root / "data/prepared", count=306)
    write_models(root)
    return root


def run(params: Params, root: Path) -> tuple[dict[str, float], list[str]]:
    """What `evaluate` returns and logs."""
    lines: list[str] = []
    return evaluation.evaluate(params, root, log=lines.append), lines


@pytest.fixture(scope="module")
def evaluated(params: Params, root: Path) -> tuple[dict[str, float], list[str]]:
    """The project at `root` with its reports."""
    return run(params, root)


@pytest.fixture(scope="module")
def small(params: Params, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Reports of four held-out images, no training captions, and hostile text."""
    root = tmp_path_factory.mktemp("small")
    write_prepared(root / "data/prepared", count=24)
    write_models(root)
    captions = "".join(json.dumps(f"{EVIL} {i}") + "\n" for i in range(24))
    (root / "data/prepared/captions.jsonl").write_text(captions)
    return root, run(with_budget(params, train_captions=0), root)[0]


def test_the_report_holds_every_model_metric_and_figure(
    evaluated: tuple[dict[str, float], list[str]], root: Path
) -> None:
    tracked, lines = evaluated
    text = (root / "reports/evaluation/metrics.json").read_text()
    results = json.loads(text)
    models = ["core", "finetuned", "refined_1", "refined_2", "refined_4"]
    assert sorted(results["heldout"]) == sorted(results["train"]) == sorted(["real", *models])
    assert results["nfe"]["refined_4"] == 4
    assert set(results["extractors"]) == {"randconv", "lite2"}
    assert results["extractors"]["randconv"]["qualified"] == 1, results["extractors"]["randconv"]["reason"]
    assert "extractor randconv is qualified" in lines
    assert results["unavailable_extractors"]["group-cls"].startswith("needs two groups")
    for split in ("heldout", "train"):
        for model in models:
            for name, metric in results[split][model].items():
                assert isinstance(metric["n"], int), (split, model, name)
                assert (metric["value"] is None) == ("reason" in metric)
    kid = results["heldout"]["refined_1"]["kid"]
    assert kid["low"] < kid["value"] < kid["high"]
    assert tracked["heldout/refined_1/kid"] == kid["value"]
    assert results["heldout"]["finetuned"]["fd"]["reason"] == "fd: n=51, needs 200"
    assert "kid_difference" not in results["heldout"]["finetuned"]
    assert results["floors"]["kid_half_half"]["n"] == 51
    assert not {"seconds", "time", "images_per_second"} & set(text.split('"')), "times are elsewhere"
    written = {path.name for path in (root / "reports/evaluation").iterdir()}
    figures = {"heldout_captions.png", "train_captions.png", "neighbours.png", "quality.png"}
    assert written == figures | {
        "metrics.json",
        "summary.json",
        "throughput.json",
        "index.html",
        "manifest.json",
    }
    assert all("\n" not in line for line in lines)
    assert any("refined_1" in line and "images/s" in line for line in lines)


def test_equal_inputs_give_equal_bytes(
    evaluated: tuple[dict[str, float], list[str]], params: Params, root: Path
) -> None:
    names = ["evaluation/metrics.json", "verdict.json", "evaluation/heldout_captions.png"]
    first = {name: (root / "reports" / name).read_bytes() for name in names}
    assert run(params, root)[0] == evaluated[0]
    assert {name: (root / "reports" / name).read_bytes() for name in names} == first


@pytest.mark.usefixtures("evaluated")
def test_the_verdict_names_model_data_and_every_rule(root: Path) -> None:
    verdict = json.loads((root / "reports/verdict.json").read_text())
    assert set(verdict) == {"passed", "model_digest", "data_digest", "rules"}
    manifest = json.loads((root / "models/refined/manifest.json").read_text())
    assert verdict["model_digest"] == manifest["digest"]
    assert verdict["data_digest"] == json.loads((root / "data/prepared/manifest.json").read_text())["digest"]
    assert verdict["passed"] == all(rule["passed"] for rule in verdict["rules"])


def test_small_data_refuses_every_gate_metric_and_invents_no_number(
    small: tuple[Path, dict[str, float]],
) -> None:
    root, tracked = small
    assert tracked["passed"] == 0
    verdict = json.loads((root / "reports/verdict.json").read_text())
    rules = {rule["name"]: rule for rule in verdict["rules"]}
    assert rules["kid_difference"]["reason"] == "kid: n=4, needs 50"
    assert rules["recall"]["value"] is None
    assert rules["finite"]["passed"]
    assert "heldout/refined_1/kid" not in tracked
    assert "kid: n=4, needs 50" in (root / "reports/evaluation/index.html").read_text()


def test_without_training_captions_the_report_has_held_out_ones_alone(
    small: tuple[Path, dict[str, float]],
) -> None:
    reports = small[0] / "reports/evaluation"
    assert "train" not in json.loads((reports / "metrics.json").read_text())
    assert not (reports / "train_captions.png").exists()
    assert "train_captions.png" not in (reports / "index.html").read_text()


def test_hostile_captions_stay_text(small: tuple[Path, dict[str, float]]) -> None:
    page = (small[0] / "reports/evaluation/index.html").read_text()
    assert "<script" not in page
    assert "{{7*7}}" in page, "nothing in a caption is evaluated"


def test_missing_models_and_empty_splits_end_in_one_line(params: Params, tmp_path: Path) -> None:
    write_prepared(tmp_path / "data/prepared", count=24)
    with pytest.raises(InputMissing, match="no model snapshot"):
        run(params, tmp_path)
    write_models(tmp_path)
    write_prepared(tmp_path / "data/prepared", count=4)  # nothing in its test split
    with pytest.raises(BadData, match=r"E-DAT-05\d"):
        run(params, tmp_path)


def test_every_family_is_chosen_once_before_any_comes_twice(tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared", count=60)
    dataset = PreparedDataset(tmp_path / "prepared")
    for i, row in enumerate(dataset.rows):
        row["base"] = str(i // 12)  # 5 families
    rows = conditions.choose_rows(dataset, "train", 12, seed=0)
    assert len(set(rows.tolist())) == 12
    assert len({dataset.rows[row]["base"] for row in rows[:5]}) == 5
    again = conditions.choose_rows(dataset, "train", 30, seed=0)
    np.testing.assert_array_equal(again[:12], rows)


def test_seeds_depend_on_caption_and_draw_so_that_models_are_compared_in_pairs(
    params: Params, root: Path
) -> None:
    dataset = PreparedDataset(root / "data/prepared")
    models = {model.name: model for model in samples.load_models(root / "models", params, "cpu")}
    caption_set = conditions.build_caption_sets(dataset, params)[0]
    fewer = dataclasses.replace(
        caption_set,
        rows=caption_set.rows[:3],
        captions=caption_set.captions[:3],
        caption_ids=caption_set.caption_ids[:3],
    )
    many = samples.sample(models["refined_1"], caption_set, dataset, params)
    few = samples.sample(models["refined_1"], fewer, dataset, params)
    assert few.which.tolist() == [0, 1, 2, 0, 1, 2]
    assert few.draw.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(few.native[:3], many.native[:3], atol=1, rtol=0)
    assert not torch.equal(few.native[:3], few.native[3:]), "another draw is another image"
