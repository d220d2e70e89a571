"""The whole evaluation on small random models: what it writes, that it repeats, and what it refuses."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import artifacts
from pipeline.config.params import Params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import BadData, ConfigError, InputMissing
from pipeline.evaluation import conditions, entry, gate
from pipeline.evaluation.entry import Champion
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import Extractor, randconv
from pipeline.evaluation.judging import recompute, thresholds_of
from pipeline.evaluation.samples import SampleResult, SampleTask
from pipeline.evaluation.verdict import PassVerdict, Rule, Verdict
from pipeline.models.config import SamplerSettings
from pipeline.models.denoiser import build_core, build_shell
from pipeline.models.snapshot import at_resolution, load_snapshot, save_snapshot
from pipeline.models.statistics import Statistics
from tests.builders import snapshot_config
from tests.conftest import with_rows, write_prepared

REFINED = ["refined_1", "refined_2", "refined_4"]
CALLS = 23  # per image, of all contenders of `write_models` together
CORE = {"patch": 1, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 2, "channels": 16, "num_blocks": 1}
EVIL = '<script>alert("x")</script> {{7*7}}'


def write_models(root: Path, **changes: Any) -> None:
    """Untrained models in models/finetuned and models/refined; `changes` are those of their config."""
    torch.manual_seed(0)
    core = build_core(8, 384, CORE)
    whole = build_shell(core, 384, 0.01, SHELL)
    statistics = Statistics((0.4, 0.3, 0.2), (0.6, 0.6, 0.6))
    config = snapshot_config(
        whole, "finetuned", CORE, [SHELL], statistics=statistics, sampling=SamplerSettings(2)
    )
    config = dataclasses.replace(config, **changes)
    save_snapshot(root / "models/finetuned", whole, config)
    refined = dataclasses.replace(config, kind="refined", passes=(1, 2, 4), sigma_start=5.0)
    save_snapshot(root / "models/refined", whole, refined)


def with_evaluate(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=changes)})


@pytest.fixture(scope="module")
def params(tiny_params: Params) -> Iterator[Params]:
    """Tiny parameters, with a budget for 102 images per contender and caption set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, two threads wait for each other at every tiny layer
    yield with_evaluate(tiny_params, max_calls=2 * 102 * CALLS)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with 204 training images, 51 held-out ones, and models."""
    root = tmp_path_factory.mktemp("evaluated")
    write_prepared(root / "data/prepared", count=306)
    write_models(root)
    return root


def run(params: Params, root: Path, **changes: Any) -> tuple[dict[str, float], list[str]]:
    """What `evaluate` returns and logs."""
    lines: list[str] = []
    return evaluate(params, root, root / "reports", log=lines.append, **changes), lines


@pytest.fixture(scope="module")
def evaluated(params: Params, root: Path) -> tuple[dict[str, float], list[str]]:
    """The project at `root` with its reports."""
    return run(params, root)


@pytest.fixture(scope="module")
def small(params: Params, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Reports of four held-out images, a budget for one image each, and hostile text."""
    root = tmp_path_factory.mktemp("small")
    write_prepared(root / "data/prepared", count=24)
    write_models(root)
    captions = "".join(json.dumps(f"{EVIL} {i}") + "\n" for i in range(24))
    (root / "data/prepared/captions.jsonl").write_text(captions)
    return root, run(with_evaluate(params, max_calls=1), root)[0]


def results_of(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "reports/evaluation/metrics.json").read_text()))


def test_the_report_holds_every_contender_metric_and_figure(
    evaluated: tuple[dict[str, float], list[str]], root: Path
) -> None:
    tracked, lines = evaluated
    results = results_of(root)
    contenders = ["equal_cost_4", "eight_calls", "finetuned", *REFINED]
    assert sum(each["nfe"] for each in results["contenders"].values()) == CALLS
    assert sorted(results["contenders"]) == sorted(contenders)
    assert sorted(results["heldout"]) == sorted(results["train"]) == sorted(["real", *contenders])
    assert results["contenders"]["refined_4"]["nfe"] == 5, "four of the core, one of the shell"
    assert results["contenders"]["eight_calls"]["nfe"] in (7, 8)
    mine, theirs = (results["contenders"][name]["multiply_adds"] for name in ("refined_4", "equal_cost_4"))
    assert mine / 2 < theirs <= 1.02 * mine
    for split in ("heldout", "train"):
        for name in contenders:
            for key, metric in results[split][name].items():
                assert isinstance(metric["n"], int), (split, name, key)
                assert (metric["value"] is None) == ("reason" in metric)
    rank = results["train"]["refined_1"]["caption_rank"]
    assert rank["low"] <= rank["value"] <= rank["high"]
    assert tracked["train/refined_1/caption_rank"] == rank["value"]
    assert results["samples"]["per_contender_and_caption_set"] == 102
    assert results["samples"]["families"] == {"train": 102, "heldout": 51}
    assert "max_calls allows 102" in results["samples"]["note"]
    text = (root / "reports/evaluation/metrics.json").read_text()
    assert not {"seconds", "time", "images_per_second"} & set(text.split('"')), "times are elsewhere"
    written = {path.name for path in (root / "reports/evaluation").iterdir()}
    assert {"metrics.json", "summary.json", "throughput.json", "evidence.safetensors", "index.html"} < written
    assert all("\n" not in line for line in lines)
    assert any("equal_cost_1: the fine-tuned model has no setting" in line for line in lines)


def test_equal_inputs_give_equal_bytes_however_the_work_is_spread(
    evaluated: tuple[dict[str, float], list[str]], params: Params, root: Path
) -> None:
    names = [
        "evaluation/metrics.json",
        "evaluation/evidence.safetensors",
        "verdict.json",
        "evaluation/heldout_captions.png",
    ]
    first = {name: (root / "reports" / name).read_bytes() for name in names}

    def backwards(make: Any, tasks: Sequence[SampleTask]) -> Iterator[SampleResult]:
        """As other machines might finish: in another order, each task in a fresh worker."""
        for task in reversed(tasks):
            with make() as work:
                yield work(task)

    assert run(params, root, map_tasks=backwards)[0] == evaluated[0]
    assert {name: (root / "reports" / name).read_bytes() for name in names} == first


@pytest.mark.usefixtures("evaluated")
def test_the_verdict_follows_from_the_evidence_alone(root: Path, params: Params) -> None:
    verdict = Verdict.read(root / "reports/verdict.json")
    path = root / "reports/evaluation/evidence.safetensors"
    assert verdict.evidence_digest == artifacts.sha256_file(path)
    assert recompute(verdict, root / "reports/verdict.json", path, params) == verdict
    judged = tuple(gate.judge(Evidence.load(path), thresholds_of(params.promotion)))
    assert verdict.refused == judged, "untrained models pass no rule, and the fine-tuned one copies nothing"
    assert verdict.model_digest == artifacts.directory_digest(root / "models/finetuned")
    assert verdict.data_digest == artifacts.directory_digest(root / "data/prepared")
    assert (verdict.baseline.address, verdict.baseline.model_digest) == (
        "models/finetuned",
        artifacts.directory_digest(root / "models/finetuned"),
    )
    assert [each.passes for each in verdict.refused] == [1, 2, 4]
    assert [each.nfe for each in verdict.refused] == [2, 3, 5]
    assert [(each.passes, each.nfe) for each in verdict.verdicts] == [(2, 3)]


def test_small_data_decides_nothing_and_invents_no_number(small: tuple[Path, dict[str, float]]) -> None:
    root, tracked = small
    assert tracked["passed"] == 0
    verdict = Verdict.read(root / "reports/verdict.json")
    rules = {rule.name: rule for rule in verdict.verdicts[0].rules}
    assert verdict.outcome == "undecided"
    assert rules["sharpness"].reason == "sharpness: n=1, needs 20"
    assert rules["captions"].value is None
    assert rules["finite"].outcome == "passed"
    assert "train/refined_1/kid" not in tracked


def blind(images: torch.Tensor) -> torch.Tensor:
    """Features that have nothing to do with an image's damage: its mean colour, rounded, and a constant."""
    return torch.cat([(images.mean((2, 3)) / 64).round(), images.new_ones(len(images), 1)], 1)


def test_an_extractor_that_does_not_qualify_is_named_and_gates_nothing(
    params: Params, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one that qualified decides in its place, also on the settings of the fine-tuned model."""
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copytree(root / "models", tmp_path / "models")
    extractors = [Extractor("blind", "0" * 64, False, blind, dim=4), randconv(16)]
    monkeypatch.setattr("pipeline.evaluation.evaluate.load_extractors", lambda *_: (extractors, []))
    chosen_by = []

    def enter(*args: Any) -> entry.Field:
        chosen_by.append(args[4].name)
        return entry.enter(*args)

    monkeypatch.setattr("pipeline.evaluation.evaluate.enter", enter)
    tracked, lines = run(params, tmp_path)
    results = results_of(tmp_path)
    assert not results["extractors"]["blind"]["qualified"]
    assert "is not clear of" in results["extractors"]["blind"]["reason"]
    assert results["extractors"]["randconv"]["qualified"]
    assert chosen_by == ["randconv"]
    rules = {rule.name for rule in Verdict.read(tmp_path / "reports/verdict.json").verdicts[0].rules}
    assert "kid_randconv" in rules
    assert not any("blind" in name for name in {*rules, *tracked})
    assert any(line.startswith("extractor blind: not used, ") for line in lines)


def test_a_model_that_refinement_gave_back_is_judged_as_it_is(
    params: Params, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    for name in ("finetuned", "refined"):
        shutil.copytree(root / "models/finetuned", tmp_path / "models" / name)
    tracked, lines = run(with_evaluate(params, max_calls=1), tmp_path)
    assert any("it is judged as it is" in line for line in lines)
    verdict = Verdict.read(tmp_path / "reports/verdict.json")
    (only,) = verdict.verdicts
    steps = load_snapshot(root / "models/finetuned").config.sampling.num_steps
    assert (only.passes, verdict.is_refined) == (steps, False)
    assert verdict.model_digest == verdict.baseline.model_digest
    assert list(results_of(tmp_path)["contenders"]) == ["eight_calls", "finetuned"]
    page = (tmp_path / "reports/evaluation/index.html").read_text()
    assert "refinement gained nothing" in page and "it is its own baseline" in page.lower()


def test_without_a_champion_the_fine_tuned_model_takes_the_place_of_a_refined_one_that_did_not_pass(
    params: Params, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lenient(_: object, passes: int, name: str, __: object) -> PassVerdict:
        outcome = "passed" if name == "finetuned" else "failed"
        return PassVerdict(passes, passes + 1, outcome, (Rule("kid_randconv", outcome, reason="worse"),))

    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copytree(root / "models", tmp_path / "models")
    monkeypatch.setattr("pipeline.evaluation.gate.judge_contender", lenient)
    run(with_evaluate(params, max_calls=1), tmp_path)
    verdict = Verdict.read(tmp_path / "reports/verdict.json")
    assert verdict.model_digest == artifacts.directory_digest(tmp_path / "models/finetuned")
    assert (verdict.outcome, verdict.is_refined, verdict.default_passes) == ("passed", False, 2)
    assert [each.passes for each in verdict.refused] == [1, 2, 4]
    page = (tmp_path / "reports/evaluation/index.html").read_text()
    assert (
        "the fine-tuned model takes its place" in page and "with 1, 2 or 4 passes it fails on quality" in page
    )

    champion = Champion(root / "models/refined", "models:/crescendo/3", passes=2)
    run(with_evaluate(params, max_calls=1), tmp_path, champion=champion)
    assert Verdict.read(tmp_path / "reports/verdict.json").is_refined, "it takes no place of a champion"


def test_a_pinned_champion_is_the_baseline(params: Params, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copytree(root / "models", tmp_path / "models")
    champion = Champion(root / "models/refined", "models:/crescendo/3", passes=2)
    run(with_evaluate(params, max_calls=1), tmp_path, champion=champion)
    verdict = Verdict.read(tmp_path / "reports/verdict.json")
    assert verdict.baseline.address == "models:/crescendo/3"
    assert verdict.baseline.model_digest == verdict.model_digest
    assert results_of(tmp_path)["contenders"]["champion"]["nfe"] == 3


def test_a_smaller_champion_is_compared_after_enlargement(params: Params, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copytree(root / "models", tmp_path / "models")
    whole = load_snapshot(root / "models/finetuned")
    core = at_resolution(whole, 8)
    save_snapshot(tmp_path / "core", core.denoiser, core.config)
    run(
        with_evaluate(params, max_calls=1),
        tmp_path,
        champion=Champion(tmp_path / "core", "models:/crescendo/3"),
    )
    assert results_of(tmp_path)["contenders"]["champion"]["nfe"] == 3, "two steps, one of them guided"


def test_a_champion_with_another_text_encoder_is_refused(params: Params, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copytree(root / "models", tmp_path / "models")
    write_models(
        tmp_path / "other", text_encoder={"name": "else", "sha256": "1" * 64, "dim": 384, "max_tokens": 16}
    )
    champion = Champion(tmp_path / "other/models/refined", "models:/crescendo/3")
    with pytest.raises(ConfigError, match="E-CFG-055"):
        run(params, tmp_path, champion=champion)


def test_hostile_captions_stay_text(small: tuple[Path, dict[str, float]]) -> None:
    page = (small[0] / "reports/evaluation/index.html").read_text()
    assert "<script>alert" not in page


def test_missing_models_and_empty_splits_end_in_one_line(params: Params, tmp_path: Path) -> None:
    write_prepared(tmp_path / "data/prepared", count=24)
    with pytest.raises(InputMissing, match="no model snapshot"):
        run(params, tmp_path)
    write_models(tmp_path)
    write_prepared(tmp_path / "data/prepared", count=4)  # nothing in its test split
    with pytest.raises(BadData, match="E-DAT-050 .*no image is in the test split"):
        run(params, tmp_path)


@pytest.mark.parametrize(
    ("count", "families", "says"),
    [(9, 9, "7 training images of 7 families"), (24, 2, "16 training images of 2 families")],
)
def test_too_few_images_or_families_to_train_on_are_refused_before_anything_else(
    count: int, families: int, says: str, params: Params, tmp_path: Path
) -> None:
    """There are no models here, which would be missed next."""
    write_prepared(tmp_path / "data/prepared", count=count)
    index = tmp_path / "data/prepared/index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["base"] = str(i % families if row["split"] == "train" else i)
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadData, match=f"E-DAT-051 .*{says}, needs 8 of 3"):
        run(params, tmp_path)


@pytest.mark.parametrize("captions", ["none", "one for all"])
def test_without_captions_to_tell_apart_all_but_captions_is_judged(
    captions: str, params: Params, tmp_path: Path
) -> None:
    write_prepared(tmp_path / "data/prepared", count=24)
    write_models(tmp_path)
    index = tmp_path / "data/prepared/index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    ids = [] if captions == "none" else [0]
    index.write_text("".join(json.dumps({**row, "captions": ids}) + "\n" for row in rows))
    tracked, lines = run(with_evaluate(params, max_calls=2 * 20 * CALLS), tmp_path)
    reason = "no image of the train split has a caption" if not ids else "all images have one caption"
    assert any(reason in line for line in lines)
    outcomes = {
        rule.name: (rule.outcome, rule.reason)
        for rule in Verdict.read(tmp_path / "reports/verdict.json").verdicts[0].rules
    }
    outcome, why = outcomes.pop("captions")
    assert outcome == "not_applicable" and str(why).startswith(reason)
    assert "not_applicable" not in {outcome for outcome, _ in outcomes.values()}
    assert "train/refined_1/caption_rank" not in tracked and "train/refined_1/top_octave" in tracked
    page = (tmp_path / "reports/evaluation/index.html").read_text()
    assert "– not applicable" in page and reason in page
    assert ("drawn without a caption" in page) == (not ids)


def test_without_captions_the_two_sets_draw_other_images(tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared", count=24)
    dataset = with_rows(tmp_path / "prepared", lambda i: {"captions": []})
    heldout, train = conditions.build_caption_sets(dataset, 20, seed=0)
    assert len({*heldout.seeds(0), *train.seeds(0)}) == 40
    assert not dataset.text(heldout.caption_ids).mask.any()


def test_every_family_is_chosen_once_before_any_comes_twice(tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared", count=60)
    dataset = with_rows(tmp_path / "prepared", lambda i: {"base": str(i // 12)})  # 5 families
    rows = conditions.choose_rows(dataset, "train", 12, seed=0)
    assert len(set(rows.tolist())) == 12
    assert len({dataset.rows[row]["base"] for row in rows[:5]}) == 5
    again = conditions.choose_rows(dataset, "train", 30, seed=0)
    np.testing.assert_array_equal(again[:12], rows)


def test_captions_are_drawn_again_only_when_all_were_drawn(tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared", count=24)  # 4 for test
    dataset = PreparedDataset(tmp_path / "prepared")
    drawn = conditions.build_caption_set(dataset, "heldout", "test", 6, seed=0)
    assert drawn.which.tolist() == [0, 1, 2, 3, 0, 1]
    assert drawn.draw.tolist() == [0, 0, 0, 0, 1, 1]
    seeds = drawn.seeds(0)
    assert len(set(seeds)) == 6
    fewer = conditions.build_caption_set(dataset, "heldout", "test", 2, seed=0)
    assert fewer.seeds(0) == seeds[:2], (
        "seeds depend on caption and draw, so that models are compared in pairs"
    )


def test_images_of_equal_captions_have_seeds_of_their_own(tmp_path: Path) -> None:
    """Labels, as captions of many images, would else draw a few distinct images over and over."""
    write_prepared(tmp_path / "prepared", count=60)
    dataset = with_rows(tmp_path / "prepared", lambda i: {"captions": [i % 2]})
    drawn = conditions.build_caption_set(dataset, "train", "train", 50, seed=0)
    assert len(drawn.rows) == 40
    assert set(drawn.captions) == {"square number 0", "square number 1"}
    assert len(set(drawn.seeds(0))) == 50
    assert len({*drawn.seeds(0), *drawn.seeds(1), *drawn.seeds(0, "choice")}) == 150


@pytest.mark.parametrize(
    ("precision", "max_calls", "count", "says"),
    [
        (0.07, 10**6, 196, ""),
        (0.07, 28_000, 189, "max_calls allows 189"),
        (0.5, 10, 1, "max_calls allows 1 "),
    ],
)
def test_sample_counts_follow_from_precision_and_budget(
    precision: float, max_calls: int, count: int, says: str
) -> None:
    planned = conditions.plan_samples(precision, max_calls, calls_per_image=74)
    assert planned.count == count
    assert says in planned.note()
