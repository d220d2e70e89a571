"""Project folders with a tiny refined model and a verdict on it, as `promote` reads them.

The verdicts have no numbers for evidence and are taken on trust (`trusted`): what is attacked here is the registry.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from pipeline import artifacts
from pipeline.config.params import Params, load_params
from pipeline.evaluation.verdict import Baseline, PassVerdict, Rule, Verdict
from pipeline.models.config import Lineage, SamplerSettings, SnapshotConfig
from pipeline.models.denoiser import Denoiser, build_core, build_shell
from pipeline.models.snapshot import describe, save_snapshot
from pipeline.models.statistics import Statistics
from pipeline.presets import change_params
from pipeline.registry.provenance import EVIDENCE, VERDICT
from pipeline.registry.requirements import requirements
from pipeline.text.minilm import SHA256 as MINILM_SHA256

ROOT = Path(__file__).parents[2]
MODEL = "models/refined"
TEACHER = Baseline("models/finetuned", "c" * 64)
CORE = {"patch": 2, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
SHELL = {"patch": 2, "channels": 16, "num_blocks": 1}
DIM, RESOLUTION, PASSES = 384, 16, (1, 2, 4)


@functools.cache
def network() -> tuple[Denoiser, SnapshotConfig]:
    """A core of 16 px under a shell, untrained, and its config as a refined model."""
    torch.manual_seed(0)
    denoiser: Denoiser = build_shell(build_core(RESOLUTION, DIM, CORE), DIM, 0.01, SHELL)
    config = SnapshotConfig(
        "refined",
        *describe(denoiser, CORE, [SHELL]),
        text_encoder={"name": "minilm", "sha256": MINILM_SHA256, "dim": DIM, "max_tokens": 16},
        statistics=Statistics((0.0,) * 3, (0.5,) * 3),
        sampling=SamplerSettings(4),
        lineage=Lineage("d" * 64, "f" * 64, "e" * 64, "models:/crescendo/1", "b" * 64),
        passes=PASSES,
        sigma_start=5.0,
    )
    return denoiser, config


def write_model(folder: Path, seed: int) -> str:
    """Replace the model in `folder` by the one of this seed; its digest."""
    denoiser, config = network()
    torch.manual_seed(seed)
    for name, parameter in denoiser.named_parameters():
        if name.endswith("gain"):
            nn.init.uniform_(parameter, 0.5, 0.9)
    shutil.rmtree(folder, ignore_errors=True)
    save_snapshot(folder, denoiser, config)
    return artifacts.directory_digest(folder)


def write_verdict(root: Path, digest: str, baseline: Baseline = TEACHER) -> None:
    """A verdict by which the model of this digest passed in 1, 2 and 4 passes."""
    rules = (Rule("recall", "passed", 0.5, threshold=0.4, reason="at least that of the baseline"),)
    verdicts = tuple(PassVerdict(count, count, "passed", rules) for count in PASSES)
    artifacts.write_atomic(root / EVIDENCE, b"no numbers")
    evidence = artifacts.sha256_file(root / EVIDENCE)
    verdict = Verdict("d" * 64, digest, evidence, baseline, True, verdicts, 1)
    artifacts.write_atomic(root / VERDICT, json.dumps(verdict.to_json()))


def make_project(root: Path, seed: int, name: str = "crescendo", baseline: Baseline = TEACHER) -> str:
    """A checkout in `root`, new or not, with the model of a seed that passed; its digest."""
    if not (root / "params.yaml").exists():
        root.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
        change_params(root, {"promotion": {"name": name}}, f"params.yaml of {name}")
    digest = write_model(root / MODEL, seed)
    write_verdict(root, digest, baseline)
    return digest


def params_of(root: Path) -> Params:
    """The parameters of a checkout."""
    return load_params(root / "params.yaml")


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Take verdicts on trust for the block, in this process, and requirements as found once: MLflow compares each
    with what is installed, for seconds that have nothing to do with the registry."""
    with (
        mock.patch("pipeline.evaluation.judging.recompute", lambda claimed, *_: claimed),
        mock.patch("pipeline.registry.registration.requirements", lambda _, encoder: required_by(encoder)),
        mock.patch("mlflow.utils.environment.warn_dependency_requirement_mismatches", lambda *_: None),
    ):
        yield


@functools.cache
def required_by(encoder: str) -> str:
    """`requirements` of models with this text encoder, found once for all forks."""
    return requirements(ROOT, encoder)
