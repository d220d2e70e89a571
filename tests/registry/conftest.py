"""A repository folder with a tiny refined model, its passing verdict and a store of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.evaluation.verdict import Baseline, Outcome, PassVerdict, Rule, Verdict, fewest_passed
from pipeline.models.config import Lineage, SamplerSettings
from pipeline.models.snapshot import save_snapshot
from pipeline.registry.provenance import EVIDENCE, VERDICT
from pipeline.text.minilm import SHA256 as MINILM_SHA256
from pipeline.tracking import store
from tests.builders import CORE, WIDE_SHELL, build_pyramid, snapshot_config

ROOT = Path(__file__).parents[2]


def write_model(
    path: Path,
    kind: str = "refined",
    encoder: str = MINILM_SHA256,
    seed: int = 0,
    bands: bool = False,
    upscale_steps: int | None = None,
    parent: str = "e" * 64,
) -> str:
    """Save an untrained 32 px model with random gains; its digest."""
    shell = {**WIDE_SHELL, "bands": bands}
    denoiser = build_pyramid(16, (0.01,), shell=shell, dim=384, seed=seed)
    config = snapshot_config(
        denoiser,
        kind,
        CORE,
        [shell],
        text_encoder={"name": "minilm", "sha256": encoder, "dim": 384, "max_tokens": 16},
        sampling=SamplerSettings(4, guidance=1.5, guidance_interval=(0.3, 5.0)),
        lineage=Lineage("d" * 64, "f" * 64, parent, "models:/crescendo/1", "b" * 64),
        passes=(1, 2, 4),
        sigma_start=5.0,
        upscale_steps=upscale_steps,
    )
    save_snapshot(path, denoiser, config)
    return artifacts.directory_digest(path)


TEACHER = Baseline("models/finetuned", "c" * 64)
REASONS = {
    "passed": "at least 0.95 of the baseline's",
    "failed": "below the baseline",
    "undecided": "23 families, about 60 needed",
}


def write_verdict(
    root: Path,
    digest: str,
    *outcomes: Outcome,
    baseline: Baseline = TEACHER,
) -> None:
    """A verdict on `digest`, whose rule `recall` has these outcomes with 1, 2 and 4 passes, or one for all."""
    outcomes = outcomes * 3 if len(outcomes) == 1 else outcomes or ("passed",) * 3
    verdicts = []
    for count, outcome in zip((1, 2, 4), outcomes, strict=True):
        recall = Rule("recall", outcome, 0.5, threshold=0.9, reason=REASONS[outcome])
        rules = (Rule("kid_difference", "passed", 0.0, threshold=0.1, reason="better"), recall)
        verdicts.append(PassVerdict(count, count, outcome, rules))
    default = fewest_passed(verdicts)
    artifacts.write_atomic(root / EVIDENCE, b"no numbers")
    evidence = artifacts.sha256_file(root / EVIDENCE)
    verdict = Verdict("d" * 64, digest, evidence, baseline, True, tuple(verdicts), default)
    artifacts.write_atomic(root / VERDICT, json.dumps(verdict.to_json()))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without models, which takes MLflow seconds to create."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        store.connect(folder)
    return folder


@pytest.fixture
def quiet_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracking server, no commit, no experiment name from outside."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CRESCENDO_GIT_COMMIT", "c0ffee0")


@pytest.fixture
def root(tmp_path: Path, quiet_store: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is also the working directory. Its verdicts have no numbers, and are taken on trust; its
    models are registered without a card, which takes time to draw."""
    monkeypatch.setattr("pipeline.evaluation.judging.recompute", lambda claimed, *_: claimed)
    monkeypatch.setattr("pipeline.registry.card.write_card", lambda *_: None)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    write_verdict(tmp_path, write_model(tmp_path / "models" / "refined"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def remake(root: Path) -> Callable[..., str]:
    """Replace the model by that of another seed, with its verdict, which compares it with the model before."""

    def make(seed: int, *outcomes: Outcome) -> str:
        before = Baseline("models:/crescendo/1", artifacts.directory_digest(root / "models/refined"))
        digest = write_model(root / "models" / "refined", seed=seed)
        write_verdict(root, digest, *outcomes, baseline=before)
        return digest

    return make
