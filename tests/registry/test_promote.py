"""Promotion against a real SQLite registry: candidate, champion, refusals, restarts, damage."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.cli import main
from pipeline.errors import (
    BadData,
    Busy,
    ConfigError,
    GateFailed,
    InputMissing,
    PipelineError,
    StorageError,
)
from pipeline.evaluation.verdict import Baseline, Outcome
from pipeline.registry import package
from pipeline.registry.card import write_card
from pipeline.registry.package import Registry
from pipeline.registry.requirements import requirements
from pipeline.tracking import stage_run
from tests.registry.conftest import write_verdict

NAME = "crescendo"
Remake = Callable[..., str]


def test_a_passing_model_becomes_candidate_and_champion_with_its_lineage(root: Path) -> None:
    digest = artifacts.directory_digest(root / "models/refined")
    with stage_run.start_stage_run("refine", root, {"lr": 0.1}, {}) as run:
        run.log_outputs({"models/refined": digest})
    assert main.run(["promote"]) == 0
    registry = Registry(root)
    assert registry.aliases(NAME) == {"candidate": "1", "champion": "1"}
    assert registry.digests() == {digest}
    tags = registry.version(NAME, "1").tags
    assert tags["crescendo.model_digest"] == digest
    assert tags["crescendo.data_digest"] == "d" * 64
    assert tags["crescendo.validation"] == "f" * 64
    assert tags["crescendo.parent_digest"] == "e" * 64
    assert tags["crescendo.init_from"] == "models:/crescendo/1"
    assert tags["crescendo.init_digest"] == "b" * 64
    assert tags["crescendo.git_commit"] == "c0ffee0"
    assert tags["crescendo.run_id"] == run.run_id
    assert tags["crescendo.verdict"] == "passed"
    assert (root / "mlflow.db").is_file() and (root / "mlartifacts").is_dir()


def test_promoting_twice_makes_one_version(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main.run(["promote"])
    main.run(["promote"])
    assert Registry(root).aliases(NAME) == {"candidate": "1", "champion": "1"}
    with pytest.raises(InputMissing):
        Registry(root).version(NAME, "2")
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 4 and "already is version 1" in out
    assert err == ""


def test_a_failing_model_leaves_the_champion_and_names_the_rule(
    root: Path, remake: Remake, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote"])
    remake(1, "failed")
    with pytest.raises(GateFailed, match=r"recall 0.5 \(threshold 0.9\): below the baseline"):
        main.run(["promote"])
    assert Registry(root).aliases(NAME) == {"candidate": "2", "champion": "1"}
    assert main.run(["promote", "--allow-candidate"]) == 0
    assert "stays the candidate" in capsys.readouterr().out
    assert Registry(root).aliases(NAME) == {"candidate": "2", "champion": "1"}


def test_the_new_champion_remembers_the_one_it_replaced(root: Path, remake: Remake) -> None:
    main.run(["promote"])
    remake(seed=1)
    main.run(["promote"])
    assert Registry(root).aliases(NAME) == {"candidate": "2", "champion": "2"}
    assert Registry(root).version(NAME, "2").tags["crescendo.replaced"] == "1"


def test_a_verdict_on_another_model_registers_nothing(root: Path) -> None:
    path = root / "reports/verdict.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_digest": "f" * 64}))
    with pytest.raises(BadData, match="judges model ffffffffffff"):
        main.run(["promote", "--allow-candidate"])
    assert not (root / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "is missing"),
        ({"passed": True}, "format of an earlier version"),
        ({"default_passes": 2}, "contradicts itself"),
    ],
)
def test_a_verdict_that_is_missing_old_or_contradicts_itself_registers_nothing(
    root: Path, change: dict[str, object] | None, words: str
) -> None:
    path = root / "reports/verdict.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PipelineError, match=words):
        main.run(["promote", "--allow-candidate"])
    assert not (root / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("outcomes", "tag", "words"),
    [
        (
            ("failed", "undecided", "undecided"),
            "undecided",
            "1 pass failed (recall 0.5 (threshold 0.9): below the baseline); "
            "2 passes undecided (recall 0.5 (threshold 0.9): 23 families, about 60 needed); 4 passes undecided (",
        ),
        (
            ("failed",),
            "failed",
            "4 passes failed (recall 0.5 (threshold 0.9): below the baseline). Fix: see reports/",
        ),
    ],
)
def test_what_did_not_pass_stays_the_candidate_and_says_why_for_each_number_of_passes(
    root: Path, outcomes: tuple[Outcome, ...], tag: str, words: str
) -> None:
    write_verdict(root, artifacts.directory_digest(root / "models/refined"), *outcomes)
    with pytest.raises(GateFailed) as error:
        main.run(["promote"])
    line = str(error.value)
    assert line.startswith(
        "E-GATE-001 reports/verdict.json: version 1 of crescendo stays the candidate: 1 pass failed"
    )
    assert words in line and len(line.splitlines()) == 1 and "kid_difference" not in line
    tags = Registry(root).version(NAME, "1").tags
    assert tags["crescendo.verdict"] == tag and "crescendo.default_passes" not in tags
    rules = json.loads(tags["crescendo.verdict_rules"])
    assert rules["1"] == {"kid_difference": "passed", "recall": "failed"} and list(rules) == ["1", "2", "4"]
    assert Registry(root).aliases(NAME) == {"candidate": "1"}


def test_one_number_of_passes_that_passed_is_enough(root: Path) -> None:
    write_verdict(root, artifacts.directory_digest(root / "models/refined"), "failed", "undecided", "passed")
    assert main.run(["promote"]) == 0
    tags = Registry(root).version(NAME, "1").tags
    assert (tags["crescendo.verdict"], tags["crescendo.default_passes"]) == ("passed", "4")


def test_a_verdict_against_another_model_than_the_champion_does_not_promote(
    root: Path, remake: Remake, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote"])
    digest = remake(1)
    write_verdict(root, digest)
    with pytest.raises(GateFailed) as error:
        main.run(["promote"])
    line = str(error.value)
    assert "compared with models/finetuned (cccccccccccc), and the champion is version 1" in line
    assert line.endswith("run `crescendo pin --baseline models:/crescendo/1`, then `dvc repro evaluate`")
    assert line.startswith("E-GATE-002") and Registry(root).aliases(NAME) == {
        "candidate": "2",
        "champion": "1",
    }
    assert main.run(["promote", "--allow-candidate"]) == 0
    assert "version 2 of crescendo stays the candidate" in capsys.readouterr().out
    champion = Baseline("models:/crescendo/1", str(Registry(root).version(NAME, "1").digest))
    write_verdict(root, digest, baseline=champion)
    assert main.run(["promote"]) == 0
    assert Registry(root).aliases(NAME) == {"candidate": "2", "champion": "2"}


def test_the_champion_itself_needs_no_comparison_with_itself(root: Path) -> None:
    main.run(["promote"])
    write_verdict(root, artifacts.directory_digest(root / "models/refined"))
    assert main.run(["promote"]) == 0
    assert Registry(root).aliases(NAME) == {"candidate": "1", "champion": "1"}


def test_without_a_champion_a_registered_baseline_does_not_promote(root: Path, remake: Remake) -> None:
    write_verdict(root, artifacts.directory_digest(root / "models/refined"), "failed")
    main.run(["promote", "--allow-candidate"])
    remake(1)
    with pytest.raises(GateFailed, match="there is no champion.*`crescendo pin --baseline teacher`"):
        main.run(["promote"])
    assert Registry(root).aliases(NAME) == {"candidate": "2"}


def test_two_promotions_do_not_run_at_once(root: Path) -> None:
    with artifacts.lease(root / "runs/promote.lock"), pytest.raises(Busy, match=str(os.getpid())):
        main.run(["promote"])


def test_a_registration_without_its_alias_is_completed_by_the_next_promotion(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            main.run(["promote"])
    assert Registry(root).aliases(NAME) == {}
    main.run(["promote"])
    assert Registry(root).aliases(NAME) == {"candidate": "1", "champion": "1"}


def test_an_alias_moved_by_another_is_noticed_when_read_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main.run(["promote"])
    registry = Registry(root)
    monkeypatch.setattr(Registry, "aliases", lambda *_: {"champion": "7"})
    with pytest.raises(Busy, match="points to version 7"):
        registry.set_alias(package.Version(NAME, "1"), "champion")


def test_a_broken_registry_is_one_line_without_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StorageError) as error:
        main.run(["promote"])
    assert "secret" not in str(error.value) and len(str(error.value).splitlines()) == 1


def test_reading_makes_no_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["history"])
    main.run(["verify"])
    for command in (["trace", "models:/crescendo/1"], ["promote", "models:/crescendo@champion"]):
        with pytest.raises(InputMissing, match="E-INP-040"):
            main.run(command)
    assert not (root / "mlflow.db").exists()


def test_a_registry_that_fails_while_a_promotion_looks_for_runs_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        from mlflow.exceptions import MlflowException

        raise MlflowException("timed out")

    monkeypatch.setattr("pipeline.tracking.runs.find_run_by_output", failing)
    with pytest.raises(StorageError, match="E-IO-040 .*timed out"):
        main.run(["promote"])


@pytest.mark.parametrize("uri", ["models:crescendo", "models:/a/b", "models:/x'@y"])
def test_an_address_of_another_form_is_refused(root: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a model"):
        main.run(["generate", "cat", "--model", uri])


LOAD = """
import sys, mlflow, pandas as pd
from pathlib import Path
from mlflow.exceptions import MlflowException

model = mlflow.pyfunc.load_model(sys.argv[1])
import pipeline
print(pipeline.__file__)

def draw(*prompts, **params):
    return model.predict(pd.DataFrame({"prompt": pd.Series(prompts, dtype=str)}), params=params)["image"]

for i, image in enumerate(draw("cat", "dog", seed=3, steps=2, n=2, width=40, height=24)):
    Path(f"{i}.png").write_bytes(image)
Path("low.png").write_bytes(draw("cat", seed=3, steps=2, resolution=16)[0])
for wrong in ({"seed": -1}, {"steps": 3}, {"width": 33}, {"n": 0}, {"guidance": 2.0}, {"resolution": 64},
              {"seed": "x"}, {"sed": 3}):
    try:
        draw("cat", **wrong)
    except MlflowException as error:
        error.message = "Failed to predict data"  # as the server does
        print(error.status, error.get_http_status_code(), error.serialize_as_json())
print(len(draw()))
changed = Path(sys.argv[1], "code/pipeline/rng.py")
changed.write_text(changed.read_text() + "#")
try:
    mlflow.pyfunc.load_model(sys.argv[1])
except MlflowException as error:
    print(error)
"""
REFUSED = (
    "E-CFG-042 seed: -1 is out of range",
    "E-CFG-041 steps: 3 is not a number of passes",
    "E-CFG-058 size: 33x32 px",
    "E-CFG-072 n: 0 makes 0 images",
    "E-CFG-070 guidance: 2 would have no effect",
    "E-CFG-051 resolution: this model makes no 64 px",
    "E-CFG-190 seed: 'x' is no whole number",
    "E-CFG-191 params: 'sed' is unknown. Fix: did you mean 'seed'?",
)


@pytest.mark.slow
def test_the_registered_model_works_alone_and_draws_the_images_of_generate(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.registry.card.write_card", write_card)
    main.run(["promote"])
    draw = ["generate", "cat", "--num", "2", "--steps", "2", "--seed", "3"]
    main.run([*draw, "--size", "40x24", "--out", "grid.png"])
    main.run([*draw, "--resolution", "16", "--out", "coarse.png"])
    (model,) = (path.parent for path in (root / "mlartifacts").rglob("MLmodel"))
    assert not list(model.rglob("*.pkl"))
    assert str(root) not in (model / "MLmodel").read_text()
    assert (model / "requirements.txt").read_text() == requirements(root, "minilm")
    assert {"README.md", "card.html", "samples/1.png"} <= artifacts.verify_directory(model)["files"].keys()
    command = [sys.executable, "-c", LOAD, str(model)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    place, *refused, none, changed = done.stdout.splitlines()
    assert (
        place.startswith(str(model))
        and none == "0"
        and "E-IO-190" in changed
        and "rng.py: differs" in changed
    )
    for line, words in zip(refused, REFUSED, strict=True):
        assert line.startswith("78 400 ") and words in line and len(json.loads(line[7:])) == 2
    grid, alone = np.asarray(Image.open("grid.png")), [np.asarray(Image.open(f"{i}.png")) for i in range(4)]
    np.testing.assert_array_equal(grid[2:-2, 2:42], alone[0])
    np.testing.assert_array_equal(grid[2:-2, 44:-2], alone[1])
    assert json.loads(Image.open("3.png").text["crescendo"])["prompt"] == "dog"
    coarse = np.asarray(Image.open("coarse.png"))
    np.testing.assert_array_equal(coarse[2:-2, 2:18], np.asarray(Image.open("low.png")))
