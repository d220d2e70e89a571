"""Promotion: register the refined model, and make it the champion if its verdict passed.

It may be interrupted anywhere and run again: a version is found by its snapshot's digest, and gets an alias only
after its files were fetched back and verified. The rules themselves are in `evaluation/gate.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts
from pipeline.errors import BadData, GateFailed, InputMissing
from pipeline.registry.package import CANDIDATE, CHAMPION, Registry, Version
from pipeline.tracking import runs

if TYPE_CHECKING:
    from pipeline.models.config import Lineage, SnapshotConfig

MODEL = "models/refined"
VERDICT = "reports/verdict.json"
LOCK = "runs/promote.lock"
MAX_TAG = 5000  # MLflow refuses longer tag values


@dataclass(frozen=True)
class RuleResult:
    """One rule of a verdict (`evaluation.gate.Rule`, as read from a file)."""

    name: str
    passed: bool
    value: float | None
    threshold: float | None
    reason: str

    def __str__(self) -> str:
        """The rule and its numbers, as in `recall 0.5 (threshold 0.9): below 0.95 of the baseline's 0.947`."""
        numbers = "" if self.value is None else f" {self.value:.4g}"
        if self.value is not None and self.threshold is not None:
            numbers += f" (threshold {self.threshold:.4g})"
        return f"{self.name}{numbers}: {self.reason.removeprefix(f'{self.name}: ')}"


@dataclass(frozen=True)
class Verdict:
    """The content of reports/verdict.json: whether one model passed, and the rules."""

    passed: bool
    model_digest: str
    data_digest: str
    rules: tuple[RuleResult, ...]

    @property
    def failed(self) -> list[str]:
        """Each failed rule in words."""
        return [str(rule) for rule in self.rules if not rule.passed]


def read_verdict(path: Path) -> Verdict:
    """Read and check a verdict. Raises InputMissing if there is no file, BadData if it is not a valid verdict."""
    fix = "run `dvc repro evaluate`"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputMissing("E-INP-041", str(path), "is missing", fix) from None
    except ValueError:
        raise BadData("E-DAT-044", str(path), "is not JSON", fix) from None
    kinds = {"passed": bool, "model_digest": str, "data_digest": str, "rules": list}
    complete = isinstance(tree, dict) and all(isinstance(tree.get(key), kind) for key, kind in kinds.items())
    if not complete or not all(_is_rule(rule) for rule in tree["rules"]):
        raise BadData("E-DAT-044", str(path), "is not a verdict", fix)
    rules = tuple(_parse_rule(rule) for rule in tree["rules"])
    if not rules or tree["passed"] != all(rule.passed for rule in rules):
        raise BadData(
            "E-DAT-044", str(path), "contradicts itself: `passed` does not follow from its rules", fix
        )
    return Verdict(tree["passed"], tree["model_digest"], tree["data_digest"], rules)


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, dict) or not isinstance(rule.get("name"), str):
        return False
    numbers = (rule.get("value"), rule.get("threshold"))
    return isinstance(rule.get("passed"), bool) and all(
        number is None or isinstance(number, int | float) for number in numbers
    )


def _parse_rule(rule: Mapping[str, Any]) -> RuleResult:
    reason = str(rule.get("reason") or "no reason given")
    return RuleResult(rule["name"], rule["passed"], rule.get("value"), rule.get("threshold"), reason)


def promote(root: Path, name: str, allow_candidate: bool = False, log: Callable[[str], None] = print) -> bool:
    """Register `models/refined` under `name` as the candidate; make it the champion if its verdict passed.

    Returns whether it is the champion now; False only with `allow_candidate`.

    Raises:
        GateFailed: the verdict did not pass (the model stays the candidate).
        InputMissing, StorageError, BadData: model or verdict is missing, damaged, or they do not match.
        Busy: another promotion is running.
    """
    with artifacts.lease(root / LOCK):
        digest, config = _read_model(root / MODEL)
        verdict = read_verdict(root / VERDICT)
        if verdict.model_digest != digest:
            problem = f"judges model {verdict.model_digest[:12]}, {MODEL} is {digest[:12]}"
            raise BadData("E-DAT-042", VERDICT, problem, "run `dvc repro evaluate`")
        registry = Registry(root)
        version = _find_or_register(registry, name, root, config.lineage, verdict, log)
        registry.set_alias(version, CANDIDATE)
        if verdict.passed:
            _set_champion(registry, version, log)
            return True
    return _keep_candidate(verdict, version, allow_candidate, log)


def _read_model(folder: Path) -> tuple[str, SnapshotConfig]:
    """Digest and config of the refined snapshot; the model is built and loaded once to see that it works."""
    from pipeline.models.snapshot import load_snapshot

    snapshot = load_snapshot(folder)
    if not snapshot.config.is_refined:
        problem = f"is a {snapshot.config.kind} model, not a refined one"
        raise BadData("E-DAT-043", str(folder), problem, "run `dvc repro refine`")
    return snapshot.digest, snapshot.config


def _find_or_register(
    registry: Registry,
    name: str,
    root: Path,
    lineage: Lineage,
    verdict: Verdict,
    log: Callable[[str], None],
) -> Version:
    """The version of the judged model, registered if there is none yet; its files are fetched back and verified."""
    digest, tags = verdict.model_digest, _verdict_tags(verdict)
    version = registry.with_digest(name, digest)
    if version is None:
        version = registry.register(name, root / MODEL, digest, _lineage_tags(root, lineage, verdict) | tags)
        log(f"registered {MODEL} ({digest[:12]}) as version {version.number} of {name}")
    else:
        log(f"{MODEL} ({digest[:12]}) already is version {version.number} of {name}")
        registry.set_tags(version, tags)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        registry.fetch(version, Path(folder))
    return version


def _lineage_tags(root: Path, lineage: Lineage, verdict: Verdict) -> dict[str, str]:
    """Where the model comes from; unknown facts have no tag."""
    facts = {
        "crescendo.data_digest": lineage.data or verdict.data_digest,
        "crescendo.validation": lineage.validation,
        "crescendo.parent_digest": lineage.parent,
        "crescendo.init_from": lineage.init_from,  # the model that was grown
        "crescendo.init_digest": lineage.init_sha256,
        "crescendo.git_commit": runs.git_commit(root),
        "crescendo.run_id": runs.find_run_by_output(MODEL, verdict.model_digest, root),
    }
    return {key: str(value) for key, value in facts.items() if value}


def _verdict_tags(verdict: Verdict) -> dict[str, str]:
    rules = {rule.name: rule.passed for rule in verdict.rules}
    return {
        "crescendo.verdict": "passed" if verdict.passed else "failed",
        "crescendo.verdict_rules": artifacts.canonical_json(rules)[:MAX_TAG],
        "crescendo.verdict_data_digest": verdict.data_digest,
    }


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


def _keep_candidate(
    verdict: Verdict, version: Version, allow_candidate: bool, log: Callable[[str], None]
) -> bool:
    failed = "; ".join(verdict.failed)
    if not allow_candidate:
        problem = f"version {version.number} of {version.name} stays the candidate: {failed}"
        fix = "see reports/evaluation/index.html, or accept the candidate with --allow-candidate"
        raise GateFailed("E-GATE-001", VERDICT, problem, fix)
    log(f"version {version.number} stays the candidate, because a rule failed: {failed}")
    return False
