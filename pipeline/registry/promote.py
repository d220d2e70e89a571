"""Promotion: register the refined model, and make it the champion if its verdict passed against the champion.

It may be interrupted anywhere and run again: a version is found by its snapshot's digest and its default number of
passes, and gets an alias only after its files were fetched back and verified. The rules themselves are in
`evaluation/gate.py`. Where refinement gained nothing, models/refined is the fine-tuned model; where the
refined model did not pass and there is no champion yet, the verdict may be about models/finetuned.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts
from pipeline.errors import BadData, GateFailed
from pipeline.evaluation.verdict import Verdict
from pipeline.registry.package import CANDIDATE, CHAMPION, Registry, Version
from pipeline.tracking import runs

if TYPE_CHECKING:
    from pipeline.models.config import Lineage, SnapshotConfig

MODEL = "models/refined"
MODELS = (MODEL, "models/finetuned")  # that a verdict may be about
VERDICT = "reports/verdict.json"
LOCK = "runs/promote.lock"
MAX_TAG = 5000  # MLflow refuses longer tag values


def promote(root: Path, name: str, allow_candidate: bool = False, log: Callable[[str], None] = print) -> bool:
    """Register the judged model (`models/refined`, or `models/finetuned` where the refined one did not pass) under
    `name` as the candidate; make it the champion if its verdict passed.

    A verdict counts only if it compares with the current champion, unless that is the same model. Returns whether
    it is the champion now; False only with `allow_candidate`.

    Raises:
        GateFailed: the verdict did not pass, or compares with another model (the model stays the candidate).
        InputMissing, StorageError, BadData: model or verdict is missing, damaged, or they do not match.
        Busy: another promotion is running.
    """
    with artifacts.lease(root / LOCK):
        verdict = Verdict.read(root / VERDICT)
        model, config = _read_judged(root, verdict)
        registry = Registry(root)
        version = _find_or_register(registry, name, root, model, config.lineage, verdict, log)
        registry.set_alias(version, CANDIDATE)
        refusal = _refusal(registry, version, verdict)
        if refusal is None:
            _set_champion(registry, version, log)
            return True
    if not allow_candidate:
        raise refusal
    log(refusal.problem)
    return False


def _read_judged(root: Path, verdict: Verdict) -> tuple[str, SnapshotConfig]:
    """The one of MODELS that the verdict is about, with its config."""
    found = {}
    for model in MODELS:
        if model == MODEL or (root / model).is_dir():
            found[model], config = _read_model(root / model)
            if found[model] == verdict.model_digest:
                return model, config
    known = ", ".join(f"{model} is {digest[:12]}" for model, digest in found.items())
    problem = f"judges model {verdict.model_digest[:12]}, {known}"
    raise BadData("E-DAT-042", VERDICT, problem, "run `dvc repro evaluate`")


def _read_model(folder: Path) -> tuple[str, SnapshotConfig]:
    """Digest and config of the snapshot; the model is built and loaded once to see that it works."""
    from pipeline.models.snapshot import load_snapshot

    snapshot = load_snapshot(folder)
    if snapshot.config.kind == "core":
        problem = "is a core, which makes no image of full size"
        raise BadData("E-DAT-043", str(folder), problem, "run `dvc repro refine`")
    return snapshot.digest, snapshot.config


def _find_or_register(
    registry: Registry,
    name: str,
    root: Path,
    model: str,
    lineage: Lineage,
    verdict: Verdict,
    log: Callable[[str], None],
) -> Version:
    """The version of the judged model, registered if there is none yet; its files are fetched back and verified."""
    digest, default, tags = verdict.model_digest, verdict.default_passes, _verdict_tags(verdict)
    version = registry.find(name, digest, default)
    if version is None:
        tags = _lineage_tags(root, model, lineage, verdict) | tags
        version = registry.register(name, root / model, digest, tags, default)
        log(f"registered {model} ({digest[:12]}) as version {version.number} of {name}")
    else:
        log(f"{model} ({digest[:12]}) already is version {version.number} of {name}")
        registry.set_tags(version, tags)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        registry.fetch(version, Path(folder))
    return version


def _lineage_tags(root: Path, model: str, lineage: Lineage, verdict: Verdict) -> dict[str, str]:
    """Where the model comes from; unknown facts have no tag."""
    facts = {
        "crescendo.data_digest": lineage.data or verdict.data_digest,
        "crescendo.validation": lineage.validation,
        "crescendo.parent_digest": lineage.parent,
        "crescendo.init_from": lineage.init_from,  # the model that was grown
        "crescendo.init_digest": lineage.init_sha256,
        "crescendo.git_commit": runs.git_commit(root),
        "crescendo.run_id": runs.find_run_by_output(model, verdict.model_digest, root),
    }
    return {key: str(value) for key, value in facts.items() if value}


def _verdict_tags(verdict: Verdict) -> dict[str, str]:
    rules = {each.passes: {rule.name: rule.outcome for rule in each.rules} for each in verdict.verdicts}
    return {
        "crescendo.verdict": verdict.outcome,
        "crescendo.verdict_rules": artifacts.canonical_json(rules)[:MAX_TAG],
        "crescendo.verdict_data_digest": verdict.data_digest,
    }


def _refusal(registry: Registry, version: Version, verdict: Verdict) -> GateFailed | None:
    """Why `version` stays the candidate; None if it becomes the champion."""
    stays = f"version {version.number} of {version.name} stays the candidate"
    if verdict.outcome != "passed":
        problem = f"{stays}: {verdict}"
        fix = "see reports/evaluation/index.html, or accept the candidate with --allow-candidate"
        return GateFailed("E-GATE-001", VERDICT, problem, fix)
    number = registry.aliases(version.name).get(CHAMPION)
    baseline = verdict.baseline
    if number is None and not baseline.is_registered:
        return None
    champion = None if number is None else registry.version(version.name, number)
    if champion is not None and champion.digest in (baseline.model_digest, version.digest):
        return None
    known = "there is no champion" if champion is None else f"the champion is version {champion.number}"
    compared = baseline.address or "the fine-tuned model"
    problem = f"{stays}: it was compared with {compared} ({baseline.model_digest[:12]}), and {known}"
    address = "teacher" if champion is None else f"models:/{champion.name}/{champion.number}"
    fix = f"run `crescendo pin --baseline {address}`, then `dvc repro evaluate`"
    return GateFailed("E-GATE-002", VERDICT, problem, fix)


def _set_champion(registry: Registry, version: Version, log: Callable[[str], None]) -> None:
    """Move `champion` to `version`, and tag it with the version that it replaced."""
    before = registry.aliases(version.name).get(CHAMPION)
    if before is not None and before != version.number:
        registry.set_tags(version, {"crescendo.replaced": before})
    registry.set_alias(version, CHAMPION)
    if before == version.number:
        log(f"version {version.number} already is the champion")
    else:
        log(f"version {version.number} is the champion" + (f", in place of {before}" if before else ""))
