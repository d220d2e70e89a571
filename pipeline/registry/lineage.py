"""What a version's tags say about where it comes from, and what it was judged to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts
from pipeline.evaluation.verdict import Verdict
from pipeline.tracking import runs

if TYPE_CHECKING:
    from pipeline.models.config import Lineage

MAX_TAG = 5000  # MLflow refuses longer tag values


def lineage_tags(root: Path, model: str, lineage: Lineage, verdict: Verdict) -> dict[str, str]:
    """Where the model in the folder `model` comes from; unknown facts have no tag."""
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


def verdict_tags(verdict: Verdict) -> dict[str, str]:
    """What was decided, by number of passes and rule."""
    rules = {each.passes: {rule.name: rule.outcome for rule in each.rules} for each in verdict.verdicts}
    return {
        "crescendo.verdict": verdict.outcome,
        "crescendo.verdict_rules": artifacts.canonical_json(rules)[:MAX_TAG],
        "crescendo.verdict_data_digest": verdict.data_digest,
    }
