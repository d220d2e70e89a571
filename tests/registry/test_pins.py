"""Models from elsewhere, to grow or to compare with: pinned by address and digest, fetched once, verified."""

import re
import shutil
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli import main
from pipeline.config.params import load_params
from pipeline.errors import ConfigError, InputMissing, PipelineError, StorageError
from pipeline.registry import pins
from tests.registry.conftest import ROOT, write_model


def comments(path: Path) -> list[str]:
    return re.findall(r"#.*", path.read_text())


def pinned(root: Path) -> tuple[str, str]:
    finetune = load_params(root / "params.yaml").finetune
    return finetune.init_from, finetune.init_sha256


def test_pinning_writes_address_and_digest_and_keeps_the_comments(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = write_model(root / "elsewhere/model", kind="finetuned")
    assert main.run(["pin", "elsewhere/model"]) == 0
    assert pinned(root) == ("elsewhere/model", digest)
    assert "finetune.init_from: models/core -> elsewhere/model" in capsys.readouterr().out
    assert comments(root / "params.yaml") == comments(ROOT / "params.yaml")
    assert main.run(["pin", "models/core"]) == 0
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_an_alias_becomes_the_version_that_it_means_now(root: Path) -> None:
    digest = artifacts.directory_digest(root / "models/refined")
    main.run(["promote"])
    assert main.run(["pin", "models:/crescendo@champion"]) == 0
    assert pinned(root) == ("models:/crescendo/1", digest)
    main.run(["pin", "models/core"])
    main.run(["pin", "models:/crescendo/1"])
    assert pinned(root) == ("models:/crescendo/1", digest)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("nowhere", InputMissing),
        ("reports", InputMissing),
        ("models:/crescendo/7", InputMissing),
        ("models:x", ConfigError),
    ],
)
def test_an_address_without_a_model_is_not_pinned(root: Path, model: str, error: type[PipelineError]) -> None:
    with pytest.raises(error):
        main.run(["pin", model])
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_a_damaged_model_is_not_pinned(root: Path) -> None:
    write_model(root / "other")
    (root / "other/config.json").write_text("{}")
    with pytest.raises(StorageError, match="config.json"):
        main.run(["pin", "other"])
    assert pinned(root) == ("models/core", "")


def test_a_registered_model_is_fetched_once_and_then_needs_no_registry(root: Path) -> None:
    digest = artifacts.directory_digest(root / "models/refined")
    main.run(["promote"])
    folder = pins.fetch(root, "models:/crescendo/1", digest, root / "runs/init")
    assert folder == root / "runs/init" / digest and artifacts.directory_digest(folder) == digest
    (root / "mlflow.db").unlink()
    shutil.rmtree(root / "mlartifacts")
    assert pins.fetch(root, "models:/crescendo/1", digest, root / "runs/init") == folder


@pytest.mark.parametrize("address", ["other", "models:/crescendo/1"])
def test_another_snapshot_than_the_pinned_one_is_refused_with_both_digests(root: Path, address: str) -> None:
    digest = artifacts.directory_digest(root / "models/refined")
    main.run(["promote"])
    shutil.copytree(root / "models/refined", root / "other")
    with pytest.raises(StorageError) as error:
        pins.fetch(root, address, "0" * 64, root / "runs/init")
    line = str(error.value)
    assert f"{address}: holds snapshot {digest[:12]}, finetune.init_sha256 expects 000000000000" in line
    assert line.endswith(f"run `crescendo pin {address}`, or restore that snapshot")
    assert not (root / "runs/init").exists()


def baseline(root: Path) -> tuple[str, str]:
    evaluate = load_params(root / "params.yaml").evaluate
    return evaluate.baseline, evaluate.baseline_sha256


def test_a_registered_baseline_is_pinned_fetched_once_and_unpinned(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = artifacts.directory_digest(root / "models/refined")
    main.run(["promote"])
    assert main.run(["pin", "--baseline", "models:/crescendo@champion"]) == 0
    assert "evaluate.baseline: '' -> models:/crescendo/1" in capsys.readouterr().out
    assert load_params(root / "params.yaml").evaluate.baseline_passes == 1
    assert baseline(root) == ("models:/crescendo/1", digest) and pinned(root) == ("models/core", "")
    section = load_params(root / "params.yaml").evaluate
    folder = pins.pinned_baseline(root, section, root / "runs/baseline")
    assert folder == root / "runs/baseline" / digest and artifacts.directory_digest(folder) == digest
    shutil.rmtree(root / "mlartifacts")
    assert pins.pinned_baseline(root, section, root / "runs/baseline") == folder
    for nothing in ("teacher", ""):
        main.run(["pin", "--baseline", nothing])
        assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()
    section = load_params(root / "params.yaml").evaluate
    assert pins.pinned_baseline(root, section, root / "runs/baseline") is None


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("models/refined", "E-CFG-056 --baseline: 'models/refined' is not the address of a registered model"),
        ("models:/crescendo@champion", "E-INP-040 models:/crescendo@champion: there is no such model"),
        ("models:crescendo", "E-CFG-040"),
    ],
)
def test_what_is_not_registered_is_not_pinned_as_the_baseline(root: Path, address: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        main.run(["pin", "--baseline", address])
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_another_baseline_than_the_pinned_one_is_refused(root: Path) -> None:
    main.run(["promote"])
    main.run(["pin", "--baseline", "models:/crescendo/1"])
    section = load_params(root / "params.yaml").evaluate.model_copy(update={"baseline_sha256": "0" * 64})
    with pytest.raises(StorageError) as error:
        pins.pinned_baseline(root, section, root / "runs/baseline")
    assert "evaluate.baseline_sha256 expects 000000000000" in str(error.value)
    assert "run `crescendo pin --baseline models:/crescendo/1`, or restore" in str(error.value)


@pytest.mark.parametrize("arguments", [[], ["models/core", "--baseline", "teacher"]])
def test_one_model_is_pinned_at_a_time(root: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main.run(["pin", *arguments])
