"""Copies of versions in another store: byte for byte, once, and whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pipeline.config.params import load_params
from pipeline.errors import ConfigError, StorageError
from pipeline.registry import signing
from pipeline.registry.copying import check_target, copy, sign_version
from pipeline.registry.journal import Journal
from pipeline.registry.package import FROM_TAG, IDENTITY, PACKAGE_TAG, Registry
from pipeline.registry.packaging import package_digest
from pipeline.registry.promote import promote
from pipeline.registry.repair import verify
from pipeline.tracking import store

NAME = "crescendo"
ADDRESS = f"models:/{NAME}/1"


@pytest.fixture
def target(root: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store; the project's own holds a champion."""
    for folder in (root, tmp_path / "production"):
        folder.mkdir(exist_ok=True)
        shutil.copy(empty_store / "mlflow.db", folder)
    promote(root, load_params(root / "params.yaml"), log=lambda line: None)
    # MLflow sets it, and `copy` shall read from the project's own.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{tmp_path}/production/mlflow.db"


def test_a_copy_is_the_same_model_once_and_moves_no_alias(root: Path, target: str) -> None:
    lines: list[str] = []
    source = Registry(root).version(NAME, "1")
    first, second = (copy(root, ADDRESS, target, lines.append) for _ in range(2))
    assert first.number == second.number == "1"
    assert ["copied" in line for line in lines] == [True, False], lines
    assert "MLFLOW_TRACKING_URI" not in os.environ or os.environ["MLFLOW_TRACKING_URI"] != target
    with store.other_store(target):
        there = Registry(root)
        copied = there.version(NAME, "1")
        assert {tag: copied.tags[tag] for tag in IDENTITY} == {tag: source.tags[tag] for tag in IDENTITY}
        assert copied.tags[FROM_TAG].endswith(f"mlflow.db {ADDRESS}")
        assert copied.tags["crescendo.verdict"] == "passed"
        assert there.aliases(NAME) == {} and not Journal(there, NAME).queue()
        verify(root, NAME, everything=True)
        promote(root, load_params(root / "params.yaml"), log=lines.append)
        assert there.aliases(NAME)["champion"] == "1" and len(there.versions(NAME)) == 1


def test_what_breaks_off_is_not_seen_and_is_completed(
    root: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.registry.registration.package_digest", lambda folder: "0" * 64)
        with pytest.raises(StorageError, match="E-IO-090"):
            copy(root, ADDRESS, target)
    with store.other_store(target):
        assert Registry(root).versions(NAME) == []
    assert copy(root, ADDRESS, target).number == "1"


def test_damaged_files_are_not_copied(root: Path, target: str) -> None:
    version = Registry(root).version(NAME, "1")
    folder = Registry(root).folder_of(version)
    assert folder is not None
    next(folder.glob("artifacts/*/config.json")).write_text("{}")
    with pytest.raises(StorageError):
        copy(root, ADDRESS, target)
    with store.other_store(target):
        assert Registry(root).versions(NAME) == []


def test_where_a_key_is_set_only_its_signature_counts(
    root: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = (write_keys(tmp_path / name) for name in ("mine", "other"))
    registry = Registry(root)

    def refusal() -> str:
        try:
            registry.verify(registry.version(NAME, "1"), tmp_path)
        except StorageError as error:
            return error.code
        return ""

    monkeypatch.setenv(signing.PUBLIC_KEY, f"{mine}.pub")
    assert refusal() == "E-IO-091"
    sign_version(root, ADDRESS, other, print)
    assert refusal() == "E-IO-092"
    sign_version(root, ADDRESS, mine, print)
    assert refusal() == ""
    copied = copy(root, ADDRESS, target)  # verified there, too
    with store.other_store(target):
        Registry(root).verify(copied, tmp_path)
    folder = registry.folder_of(registry.version(NAME, "1"))
    assert folder is not None
    (folder / "code/pipeline/more.py").write_text("")
    tags = {PACKAGE_TAG: package_digest(folder)}  # as one who can write to the registry would
    registry.set_tags(registry.version(NAME, "1"), tags)
    assert refusal() == "E-IO-092"
    with pytest.raises(ConfigError, match="E-CFG-096 --key"):
        signing.sign(folder, Path(f"{mine}.pub"))


def write_keys(path: Path) -> Path:
    """A private key at `path`, its public one at `path`.pub."""
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Path(f"{path}.pub").write_bytes(public)
    return path


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("production", 93),
        ("models:/a/1", 93),
        ("sqlite:////tmp/../tmp/mlflow.db", 94),
        ("sqlite:////none/x.db", 95),
    ],
)
def test_a_target_is_another_store(to: str, code: int) -> None:
    with pytest.raises(ConfigError, match=f"E-CFG-0{code}"):
        check_target(to, "sqlite:////tmp/mlflow.db")
