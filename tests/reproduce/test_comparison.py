"""Where bits differ, the stage and the cause are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline import artifacts
from pipeline.reproduce.comparison import Cause, Outcome, Output, Report, causes, differing_parts

PINS = {"torch": "2.15.0", "pillow": "12.0.0"}
FACTS = {
    "device": "EPYC (AVX512)",
    "instructions": "avx avx2",
    "torch": "2.15.0",
    "python": "3.11.7",
    "precision": "bfloat16",
    "packages": "{}",
}


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        ({"device": "Xeon (AVX2)"}, "another processor", "device is Xeon (AVX2), was EPYC (AVX512)"),
        ({"instructions": "avx"}, "another processor", "instructions is avx, was avx avx2"),
        ({"packages": '{"pillow": "11.1.0"}'}, "another library", "pillow is 11.1.0, was 12.0.0"),
        ({"torch": "2.15.0+cu130"}, "another library", "torch is 2.15.0+cu130, was 2.15.0"),
        ({"packages": '{"torch": "2.14"}', "torch": "2.14"}, "another library", "torch is 2.14, was 2.15.0"),
        ({"precision": "float32"}, "another compute profile", "precision is float32, was bfloat16"),
        ({"settings": "MKL_CBWR=AVX2"}, "another setting", "settings is MKL_CBWR=AVX2, was none"),
        ({"python": "3.13.1"}, "another Python", "python is 3.13.1, was 3.11.7"),
        ({}, "cause unknown", "data, code, libraries, processor and settings are those of the version"),
    ],
)
def test_a_fact_that_is_another_is_the_cause(change: dict[str, str], kind: str, what: str) -> None:
    assert causes(FACTS, {**FACTS, **change}, PINS, [], []) == (Cause(kind, what),)


def test_data_and_code_come_first_and_missing_facts_are_said() -> None:
    found = causes(FACTS, {**FACTS, "python": "3.13"}, PINS, ["data/raw"], ["pipeline/data"])
    assert [cause.kind for cause in found] == ["other data", "other code", "another Python"]
    assert causes({}, FACTS, PINS, [], [])[0].what.startswith("the version does not say")
    many = {f"p{i}": "1" for i in range(9)}
    (found_many,) = causes(FACTS, {**FACTS, "packages": json.dumps(many)}, PINS, [], [])
    assert found_many.what.endswith("and 4 more")


def test_files_that_differ_are_named_and_weights_measured(tmp_path: Path) -> None:
    for name, value in (("ours", 1.0), ("theirs", 1.5)):
        with artifacts.commit_directory(tmp_path / name) as folder:
            save_file({"w": torch.tensor([2.0, value])}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
    (part,) = differing_parts(tmp_path / "ours", tmp_path / "theirs")
    assert part == "model.safetensors: weights differ by 5.0e-01 at most, the largest is 2.0e+00"
    assert differing_parts(tmp_path, tmp_path / "ours") == ()


def test_a_report_names_the_first_stage_that_differs_for_people_and_programs() -> None:
    same = Outcome("prepare", 3.2, 4.0, (Output("data/prepared", "a" * 64, "a" * 64),))
    unknown = Outcome("x", 1.0, None, (Output("models/x", None, "d" * 64),))
    other = Outcome(
        "pretrain", 5.0, None, (Output("models/core", "b" * 64, "c" * 64, ("f",)),), (Cause("k", "w"),)
    )
    report = Report("models:/x/1", "e" * 64, "0" * 40, "this one", {}, [same, unknown])
    assert report.identical and list(report.lines())[-1] == "identical" and report.to_json()["first"] is None
    assert (
        list(report.lines())[0]
        == "prepare      data/prepared aaaaaaaaaaaa identical  (3 s, the first time 4 s)"
    )
    report.outcomes.append(other)
    lines, tree = list(report.lines()), report.to_json()
    assert "cccccccccccc differs from bbbbbbbbbbbb" in lines[2]
    assert lines[-2:] == ["differs: pretrain is the first stage that does", "  k: w"]
    assert (tree["outcome"], tree["first"]) == ("differs", "pretrain")
    assert json.loads(json.dumps(tree))["causes"] == [{"kind": "k", "what": "w"}]
