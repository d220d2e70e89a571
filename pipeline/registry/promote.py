"""Promotion: register the refined model, and make it the champion if the verdict on it says so.

It may be stopped anywhere and run again: a version is found by its snapshot's digest, and only a version whose
files came back whole gets an alias. The rules themselves are in `evaluation/gate.py`; this only obeys.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import BadData, GateFailed, InputMissing
from pipeline.registry.package import CANDIDATE, CHAMPION, Registry, Version
from pipeline.tracking import runs

MODEL = "models/refined"
VERDICT = "reports/verdict.json"
LOCK = "runs/promote.lock"
MAX_TAG = 5000  # MLflow refuses longer tag values

Log = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """What reports/verdict.json says about one model."""

    passed: bool
    model_digest: str
    data_digest: str
    rules: tuple[Mapping[str, Any], ...]

    @property
    def failed(self) -> list[str]:
        """A few words about each rule that is not met."""
        return [_explain(rule) for rule in self.rules if not rule["passed"]]


def _explain(rule: Mapping[str, Any]) -> str:
    value, threshold = rule.get("value"), rule.get("threshold")
    numbers = "" if value is None else f" {value:.4g}"
    numbers += "" if value is None or threshold is None else f" (threshold {threshold:.4g})"
    reason = str(rule.get("reason") or "no reason given").removeprefix(f"{rule['name']}: ")
    return f"{rule['name']}{numbers}: {reason}"


def read_verdict(path: Path) -> Verdict:
    """Read and check a verdict. Raises InputMissing if there is none, BadData if it is not one."""
    fix = "run `dvc repro evaluate`"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputMissing("E-INP-041", str(path), "is missing", fix) from None
    except ValueError:
        raise BadData("E-DAT-050", str(path), "is not JSON", fix) from None
    kinds = {"passed": bool, "model_digest": str, "data_digest": str, "rules": list}
    whole = isinstance(tree, dict) and all(isinstance(tree.get(key), kind) for key, kind in kinds.items())
    if not whole or not all(_is_rule(rule) for rule in tree["rules"]):
        raise BadData("E-DAT-050", str(path), "is not a verdict", fix)
    rules = tuple(tree["rules"])
    if not rules or tree["passed"] != all(rule["passed"] for rule in rules):
        raise BadData("E-DAT-050", str(path), "contradicts itself: `passed` is not that of its rules", fix)
    return Verdict(tree["passed"], tree["model_digest"], tree["data_digest"], rules)


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, dict) or not isinstance(rule.get("name"), str):
        return False
    numbers = (rule.get("value"), rule.get("threshold"))
    return isinstance(rule.get("passed"), bool) and all(
        number is None or isinstance(number, int | float) for number in numbers
    )


def promote(root: Path, name: str, allow_candidate: bool = False, say: Log = print) -> bool:
    """Register `models/refined` under `name` as the candidate; make it the champion if its verdict passed.

    Returns whether it is the champion now; False only with `allow_candidate`.

    Raises:
        GateFailed: the verdict did not pass (the model stays the candidate).
        InputMissing, StorageError, BadData: model or verdict is missing, damaged, or not of each other.
        Busy: another promotion runs.
    """
    with artifacts.lease(root / LOCK):
        digest, config = _read_model(root / MODEL)
        verdict = read_verdict(root / VERDICT)
        if verdict.model_digest != digest:
            problem = f"judges model {verdict.model_digest[:12]}, {MODEL} is {digest[:12]}"
            raise BadData("E-DAT-042", VERDICT, problem, "run `dvc repro evaluate`")
        registry = Registry(root)
        version = _find_or_register(registry, name, root, digest, config, verdict, say)
        registry.set_alias(version, CANDIDATE)
        if verdict.passed:
            _set_champion(registry, version, say)
            return True
    return _keep_candidate(verdict, version, allow_candidate, say)


def _read_model(folder: Path) -> tuple[str, dict[str, Any]]:
    """Digest and config of the refined snapshot, which is built and filled once to see that it works."""
    from pipeline.models.snapshot import load_snapshot

    snapshot = load_snapshot(folder)
    if snapshot.config["kind"] != "refined":
        problem = f"is a {snapshot.config['kind']} model, not a refined one"
        raise BadData("E-DAT-043", str(folder), problem, "run `dvc repro refine`")
    return snapshot.digest, snapshot.config


def _find_or_register(
    registry: Registry,
    name: str,
    root: Path,
    digest: str,
    config: Mapping[str, Any],
    verdict: Verdict,
    say: Log,
) -> Version:
    """The version of this digest, made if need be; its files have been fetched back and verified."""
    judged = _verdict_tags(verdict)
    version = registry.with_digest(name, digest)
    if version is None:
        tags = {**_lineage_tags(root, digest, config, verdict), **judged}
        version = registry.register(name, root / MODEL, digest, tags)
        say(f"registered {MODEL} ({digest[:12]}) as version {version.number} of {name}")
    else:
        say(f"{MODEL} ({digest[:12]}) already is version {version.number} of {name}")
        registry.set_tags(version, judged)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        registry.fetch(version, Path(folder))
    return version


def _lineage_tags(root: Path, digest: str, config: Mapping[str, Any], verdict: Verdict) -> dict[str, str]:
    """Where the model comes from; what is not known has no tag."""
    lineage = config.get("lineage", {})
    known = {
        "crescendo.data_digest": lineage.get("data") or verdict.data_digest,
        "crescendo.validation": lineage.get("validation"),
        "crescendo.parent_digest": lineage.get("parent"),
        "crescendo.init_from": lineage.get("init_from"),  # the model that was grown
        "crescendo.init_digest": lineage.get("init_sha256"),
        "crescendo.git_commit": runs.git_commit(root),
        "crescendo.run_id": runs.find_run_by_output(MODEL, digest, root),
    }
    return {key: str(value) for key, value in known.items() if value}


def _verdict_tags(verdict: Verdict) -> dict[str, str]:
    rules = {rule["name"]: rule["passed"] for rule in verdict.rules}
    return {
        "crescendo.verdict": "passed" if verdict.passed else "failed",
        "crescendo.verdict_rules": artifacts.canonical_json(rules)[:MAX_TAG],
        "crescendo.verdict_data_digest": verdict.data_digest,
    }


def _set_champion(registry: Registry, version: Version, say: Log) -> None:
    """Move `champion`, and note in the version which one it replaced."""
    before = registry.aliases(version.name).get(CHAMPION)
    if before is not None and before != version.number:
        registry.set_tags(version, {"crescendo.replaced": before})
    registry.set_alias(version, CHAMPION)
    if before == version.number:
        say(f"version {version.number} already is the champion")
    else:
        say(f"version {version.number} is the champion" + (f", in place of {before}" if before else ""))


def _keep_candidate(verdict: Verdict, version: Version, allow_candidate: bool, say: Log) -> bool:
    failed = "; ".join(verdict.failed)
    if not allow_candidate:
        problem = f"version {version.number} of {version.name} stays the candidate: {failed}"
        fix = "look at reports/evaluation/index.html, or accept it as it is with --allow-candidate"
        raise GateFailed("E-GATE-001", VERDICT, problem, fix)
    say(f"version {version.number} stays the candidate, because a rule failed: {failed}")
    return False
