"""The default number of passes: the fewest that passed, for `crescendo generate` and the registered model alike."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.cli import main
from pipeline.config.params import load_params
from pipeline.errors import StorageError
from pipeline.evaluation.verdict import Outcome, PassVerdict, Rule, Verdict
from pipeline.inference.png import read_png
from pipeline.registry.package import DEFAULT_TAG, Registry
from pipeline.registry.provenance import EVIDENCE
from pipeline.tracking import store
from tests.registry.conftest import TEACHER, write_model, write_verdict

NAME = "crescendo"
Judge = Callable[..., None]


@pytest.fixture
def judge(root: Path) -> Judge:
    """Replace the verdict on the same model by one with these outcomes with 1, 2 and 4 passes."""
    digest = artifacts.directory_digest(root / "models/refined")

    def write(*outcomes: Outcome) -> None:
        write_verdict(root, digest, *outcomes)

    return write


def defaults(root: Path) -> dict[str, int | None]:
    """{version: default passes}, in the tags and, after a check, in the files."""
    registry, found = Registry(root), {}
    client, _ = store.connect(root)
    for each in client.search_model_versions(f"name = '{NAME}'"):
        version = registry.version(NAME, str(each.version))
        registry.fetch(version, root / "copy")
        shutil.rmtree(root / "copy")
        found[version.number] = version.default_passes
    return found


def test_a_changed_default_is_a_new_version_of_the_same_model(root: Path, judge: Judge) -> None:
    judge("failed", "undecided", "failed")
    main.run(["promote", "--allow-candidate"])
    judge("failed", "passed", "passed")
    main.run(["promote"])
    assert Registry(root).aliases(NAME) == {"candidate": "2", "champion": "2"}
    judge("passed")
    main.run(["promote"])
    assert defaults(root) == {"1": None, "2": 2, "3": 1}
    assert Registry(root).aliases(NAME) == {"candidate": "3", "champion": "3"}
    tags = Registry(root).version(NAME, "1").tags
    assert tags["crescendo.verdict"] == "undecided", "a version keeps the verdict that its files were made by"


def test_where_refinement_gained_nothing_the_fine_tuned_model_is_promoted_in_its_own_steps(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = write_model(root / "models/refined", kind="finetuned")
    rules = (Rule("copies", "passed", 0.0, threshold=0.1, reason="no more than among real images"),)
    only = PassVerdict(4, 6, "passed", rules)
    verdict = Verdict("d" * 64, digest, artifacts.sha256_file(root / EVIDENCE), TEACHER, False, (only,), 4)
    artifacts.write_atomic(root / "reports/verdict.json", json.dumps(verdict.to_json()))
    assert main.run(["promote"]) == 0
    assert defaults(root) == {"1": 4}
    assert main.run(["generate", "smile", "--out", "promoted.png"]) == 0
    assert main.run(["generate", "smile", "--model", "models/refined", "--out", "plain.png"]) == 0
    (promoted, pixels), (plain, same) = (
        read_png(Path(f"{n}.png").read_bytes()) for n in ("promoted", "plain")
    )
    assert pixels == same and promoted and plain and (promoted["steps"], plain["steps"]) == (4, 4)
    assert "pass" not in capsys.readouterr().err


def test_a_verdict_may_be_about_the_fine_tuned_model_which_then_is_the_baseline_in_its_own_steps(
    root: Path,
) -> None:
    digest = write_model(root / "models/finetuned", kind="finetuned", seed=3)
    passed, failed = (Rule("copies", outcome, 0.0, threshold=0.1) for outcome in ("passed", "failed"))
    refused = (PassVerdict(1, 2, "failed", (failed,)),)
    only = PassVerdict(12, 12, "passed", (passed,))
    verdict = Verdict(
        "d" * 64, digest, artifacts.sha256_file(root / EVIDENCE), TEACHER, False, (only,), 12, refused
    )
    artifacts.write_atomic(root / "reports/verdict.json", json.dumps(verdict.to_json()))
    assert main.run(["promote"]) == 0
    champion = Registry(root).resolve("models:/crescendo@champion")
    assert (champion.digest, champion.default_passes) == (digest, 12)
    assert main.run(["pin", "--baseline", "models:/crescendo@champion"]) == 0
    pinned = load_params(root / "params.yaml").evaluate
    assert (pinned.baseline_sha256, pinned.baseline_passes) == (digest, 0)


def test_another_verdict_with_the_same_default_is_the_same_version(root: Path, judge: Judge) -> None:
    judge("failed", "passed", "passed")
    main.run(["promote"])
    judge("undecided", "passed", "failed")
    main.run(["promote"])
    assert defaults(root) == {"1": 2}
    assert '"recall":"undecided"' in Registry(root).version(NAME, "1").tags["crescendo.verdict_rules"]


def generated(path: str, *options: str) -> np.ndarray:
    assert main.run(["generate", "cat", "--num", "1", "--seed", "3", "--out", path, *options]) == 0
    return np.asarray(Image.open(path))


def test_generate_takes_the_default_of_the_version_and_says_so(
    root: Path, judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge("failed", "passed", "passed")
    main.run(["promote"])
    image = generated("a.png")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "wrote 1 image of 32x32 px to a.png, in 2 passes" and err == ""
    np.testing.assert_array_equal(image, generated("b.png", "--steps", "2"))
    assert (image != generated("c.png", "--model", "models/refined")).any()
    assert capsys.readouterr().out.splitlines()[-1].endswith("c.png, in 1 pass")
    generated("d.png", "--steps", "4")
    assert capsys.readouterr().out.splitlines()[-1].endswith("d.png, in 4 passes")


def test_a_candidate_of_which_nothing_passed_takes_its_fewest_passes_and_says_so(
    root: Path, judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge("undecided")
    main.run(["promote", "--allow-candidate"])
    image = generated("a.png")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("in 1 pass")
    assert err == "note: no number of passes of this model passed its evaluation; its default is the fewest\n"
    np.testing.assert_array_equal(image, generated("b.png", "--model", "models/refined"))


@pytest.mark.parametrize("value", ["1", "4", "none", "-2"])
def test_a_changed_tag_is_noticed(root: Path, judge: Judge, value: str) -> None:
    judge("failed", "passed", "passed")
    main.run(["promote"])
    Registry(root).set_tags(Registry(root).version(NAME, "1"), {DEFAULT_TAG: value})
    with pytest.raises(
        StorageError, match="E-IO-042 models:/crescendo/1: has 2 as default passes, its tag says"
    ):
        main.run(["generate", "cat", "--num", "1"])


def test_a_changed_configuration_of_the_model_is_noticed(root: Path, judge: Judge) -> None:
    judge("failed", "passed", "passed")
    main.run(["promote"])
    (mlmodel,) = (root / "mlartifacts").rglob("MLmodel")
    text = mlmodel.read_text()
    assert "default_passes: 2" in text
    for changed in (text.replace("default_passes: 2", "default_passes: 4"), "flavors: []", "{"):
        mlmodel.write_text(changed)
        with pytest.raises(StorageError, match="as default passes, its tag says 2"):
            main.run(["generate", "cat", "--num", "1"])


LOAD = """
import sys, mlflow, pandas as pd
prompts = pd.DataFrame({"prompt": ["cat"]})
model = mlflow.pyfunc.load_model(sys.argv[1])
open("default.bin", "wb").write(model.predict(prompts, params={"seed": 3})["image"][0])
open("asked.bin", "wb").write(model.predict(prompts, params={"seed": 3, "steps": 1})["image"][0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("outcomes", "passes"), [(("failed", "passed", "passed"), "2"), (("failed",), "1")])
def test_the_registered_model_takes_the_same_default(
    root: Path, judge: Judge, outcomes: tuple[Outcome, ...], passes: str
) -> None:
    judge(*outcomes)
    main.run(["promote", "--allow-candidate"])
    (model,) = (path.parent for path in (root / "mlartifacts").rglob("MLmodel"))
    subprocess.run([sys.executable, "-c", LOAD, str(model)], cwd=root, check=True, capture_output=True)
    for name, steps in (("default.bin", passes), ("asked.bin", "1")):
        alone = np.asarray(Image.open(io.BytesIO((root / name).read_bytes())))
        np.testing.assert_array_equal(alone, generated("grid.png", "--steps", steps)[2:-2, 2:-2])
