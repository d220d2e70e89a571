"""A version that was copied to another store is judged and promoted there, from the registry alone."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli import main
from pipeline.config.params import load_params
from pipeline.errors import BadData, GateFailed, InputMissing, PipelineError, StorageError
from pipeline.evaluation.estimates import estimates_of
from pipeline.evaluation.evidence import Evidence, Subject
from pipeline.evaluation.judging import build_verdict, recompute
from pipeline.presets import change_params
from pipeline.registry.package import PACKAGE_TAG, Registry
from pipeline.registry.packaging import package_digest
from pipeline.registry.promote import EVIDENCE, VERDICT
from tests.evaluation.evidence import evidence
from tests.registry.conftest import write_model

NAME = "crescendo"
ADDRESS = f"models:/{NAME}/1"
TEACHER = ("models/finetuned", "c" * 64)


def judge(root: Path, baseline: tuple[str, str] = TEACHER, families: int = 120) -> str:
    """Write evidence on models/refined, and the verdict that follows from it; the outcome."""
    address, digest = baseline
    refined = artifacts.directory_digest(root / "models/refined")
    subject = Subject("d" * 64, {"refined": refined, "finetuned": digest}, address, 12)
    path = root / EVIDENCE
    evidence(families, nfe={"refined_1": 2, "finetuned": 24}, subject=subject).save(path)
    estimates = estimates_of(Evidence.load(path))
    verdict = build_verdict(estimates, artifacts.sha256_file(path), load_params(root / "params.yaml"))
    (root / VERDICT).write_text(json.dumps(verdict.to_json()))
    return verdict.outcome


@pytest.fixture
def production(
    root: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The address of a store that holds a copy of the champion of `root`, and is now that of this process, which is
    in a folder without a project."""
    monkeypatch.setattr("pipeline.evaluation.judging.recompute", recompute)
    folder = tmp_path_factory.mktemp("production")
    for place in (root, folder):
        shutil.copy(empty_store / "mlflow.db", place)
    assert judge(root) == "passed"
    uri = f"sqlite:///{folder}/mlflow.db"
    main.run(["promote"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it
    main.run(["copy", ADDRESS, "--to", uri])
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def files_there() -> Path:
    """The files of version 1 in the store of this process."""
    registry = Registry(Path.cwd())
    folder = registry.folder_of(registry.version(NAME, "1"))
    assert folder is not None
    return folder


def test_a_copy_is_promoted_verified_and_traced_where_there_is_no_project(
    production: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote", ADDRESS, "--expect", "none", "--dry-run"])
    assert "would move champion from version none to 1" in capsys.readouterr().out
    assert Registry(Path.cwd()).aliases(NAME) == {}
    assert main.run(["promote", ADDRESS, "--expect", "none"]) == 0
    assert "its verdict follows from its evidence" in capsys.readouterr().out
    assert Registry(Path.cwd()).aliases(NAME) == {"candidate": "1", "champion": "1"}
    main.run(["promote", f"models:/{NAME}@champion"])
    assert "version 1 already is the champion" in capsys.readouterr().out
    main.run(["verify", "--all", "--name", NAME])
    main.run(["history", "--name", NAME])
    main.run(["trace", ADDRESS])
    out = capsys.readouterr().out
    for words in (
        "version 1 (candidate, champion): verified",
        "  copy  ",
        "candidate none -> 1, champion none -> 1",
        f"copied from  sqlite:///{Path.cwd().parents[1]}",
        "verdict  against models/finetuned",
    ):
        assert words in out, out
    assert not list(Path.cwd().iterdir()), "nothing is left where it was called"


def forge(change: str) -> None:
    """Change evidence or verdict of the copy, and its tag and its journal as well, as one who may write does."""
    folder = files_there()
    project = folder / "artifacts/project"
    if change == "evidence":
        (project / "evidence.safetensors").write_bytes(b"better")
    elif change == "verdict":
        tree = json.loads((project / "verdict.json").read_text())
        tree["verdicts"][0]["rules"][-1]["value"] = 0.123
        (project / "verdict.json").write_text(json.dumps(tree))
    elif change == "limits":
        text = (project / "params.yaml").read_text()
        (project / "params.yaml").write_text(text.replace("recall_margin: 0.1 ", "recall_margin: 0.9 "))
    else:
        (project / "evidence.safetensors").unlink()
    registry = Registry(Path.cwd())
    tags = {PACKAGE_TAG: package_digest(folder)}
    registry.set_tags(registry.version(NAME, "1"), tags)
    (entry,) = registry.versions(f"{NAME}.journal")
    told = json.loads(entry.tags["crescendo.registered"])
    registry.set_tags(entry, {"crescendo.registered": json.dumps(told | tags)})


@pytest.mark.parametrize(
    ("change", "kind", "line"),
    [
        ("evidence", BadData, "E-DAT-190 models:/crescendo/1: its verdict does not hold: names evidence"),
        ("verdict", BadData, "E-DAT-190 models:/crescendo/1: its verdict does not hold: does not follow"),
        ("limits", BadData, "E-DAT-190 models:/crescendo/1: its verdict does not hold: does not follow"),
        ("none", InputMissing, "E-INP-190 models:/crescendo/1: no evidence is stored with it"),
    ],
)
def test_forged_evidence_is_refused_though_all_digests_agree(
    production: str, change: str, kind: type[PipelineError], line: str
) -> None:
    forge(change)
    main.run(["verify", "--all", "--name", NAME])
    with pytest.raises(kind) as error:
        main.run(["promote", ADDRESS])
    assert str(error.value).startswith(line)
    assert Registry(Path.cwd()).aliases(NAME) == {}


def test_evidence_and_tags_that_were_changed_are_refused(production: str) -> None:
    path = files_there() / "artifacts/project/evidence.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StorageError, match="E-IO-042 .*evidence.safetensors"):
        main.run(["promote", ADDRESS])
    registry = Registry(Path.cwd())
    registry.set_tags(registry.version(NAME, "1"), {PACKAGE_TAG: package_digest(files_there())})
    with pytest.raises(StorageError, match="E-IO-191 .*package_digest is not that of its registration"):
        main.run(["promote", ADDRESS])
    assert registry.aliases(NAME) == {}


def test_a_copy_that_was_compared_with_another_champion_or_does_not_pass_here_waits(
    root: Path, production: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    shutil.copy(root / "params.yaml", here)
    changes = {"promotion": {"sharpness_margin": 1e-6, "caption_margin": 1e-6}}
    change_params(here, changes, "params.yaml with a stricter limit")
    with pytest.raises(
        GateFailed, match="E-GATE-190 .*passed by its own limits, not by those of params.yaml"
    ):
        main.run(["promote", ADDRESS])
    (here / "params.yaml").unlink()
    main.run(["promote", ADDRESS])
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    write_model(root / "models/refined", seed=1)
    champion = str(Registry(root).version(NAME, "1").digest)
    assert judge(root, ("models:/crescendo/7", "b" * 64)) == "passed"
    main.run(["promote", "--allow-candidate"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main.run(["copy", "models:/crescendo/2", "--to", production])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production)
    with pytest.raises(GateFailed, match="E-GATE-192 .*models:/crescendo/7 .*the champion is version 1"):
        main.run(["promote", "models:/crescendo/2"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    write_model(root / "models/refined", seed=2)
    assert judge(root, ("models:/crescendo/1", champion), families=40) == "undecided"
    main.run(["promote", "--allow-candidate"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main.run(["copy", "models:/crescendo/3", "--to", production])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production)
    with pytest.raises(GateFailed, match="E-GATE-191 models:/crescendo/3: it does not become champion"):
        main.run(["promote", "models:/crescendo/3"])
    assert Registry(root).aliases(NAME)["champion"] == "1"
