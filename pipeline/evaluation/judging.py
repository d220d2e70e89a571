"""From evidence to the verdict: a pure function of the evidence's file and of params.yaml.

`evaluate` judges with it when it writes reports/verdict.json, and `recompute` judges again when a model is
promoted, so that nothing of a verdict has to be taken on trust: its digests and thresholds are those of the
evidence, whose own digest it names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline import artifacts
from pipeline.config.params import Evaluate, Params, Promotion
from pipeline.errors import BadData, InputMissing
from pipeline.evaluation import gate
from pipeline.evaluation.estimates import Estimates, estimates_of
from pipeline.evaluation.evidence import TEACHER, Evidence
from pipeline.evaluation.verdict import Baseline, PassVerdict, Verdict, fewest_passed

RTOL = 1e-4  # of a number that another processor computes again; files hold six digits
ATOL = 1e-6
REJUDGE = "run `dvc repro evaluate`"


def thresholds_of(promotion: Promotion) -> gate.Thresholds:
    """The thresholds in params.yaml."""
    return gate.Thresholds(**{each.name: getattr(promotion, each.name) for each in fields(gate.Thresholds)})


def add_training_spread(verdict: PassVerdict, section: Evaluate) -> PassVerdict:
    """The verdict with what `evaluate.training_spread` says of its rules."""
    known = {
        each.rule: half_width
        for each in section.training_spread
        for passes, half_width in zip(section.num_passes, each.half_widths, strict=True)
        if passes == verdict.passes
    }
    rules = tuple(replace(rule, training=known.get(rule.name)) for rule in verdict.rules)
    return replace(verdict, rules=rules)


def build_verdict(estimates: Mapping[str, Estimates], digest: str, params: Params) -> Verdict:
    """Judge by the estimates from the evidence, whose file has this digest."""
    about = estimates["train"].evidence.description
    subject = about.subject
    assert subject is not None, "`recompute` refuses evidence that does not say what it is of"
    judged = gate.judge_estimates(estimates, thresholds_of(params.promotion))
    verdicts = tuple(add_training_spread(each, params.evaluate) for each in judged)
    whole = Verdict(
        data_digest=subject.data_digest,
        model_digest=subject.models["refined"],
        evidence_digest=digest,
        baseline=Baseline(subject.baseline_address, subject.models[about.baseline]),
        is_refined=TEACHER not in about.candidates.values(),
        verdicts=verdicts,
        default_passes=fewest_passed(verdicts),
    )
    if whole.default_passes or not whole.is_refined or about.baseline != TEACHER:
        return whole
    return _stand_in(whole, estimates, params)


def _stand_in(whole: Verdict, estimates: Mapping[str, Estimates], params: Params) -> Verdict:
    """The verdict on the fine-tuned model, where no number of passes of the refined one passed and there is no
    champion yet: a first model is better than none. The same verdict where it does not pass either."""
    subject = estimates["train"].evidence.description.subject
    assert subject is not None
    thresholds = thresholds_of(params.promotion)
    only = gate.judge_contender(estimates, subject.teacher_steps, TEACHER, thresholds)
    if only.outcome != "passed":
        return whole
    return replace(
        whole,
        model_digest=subject.models[TEACHER],
        is_refined=False,
        verdicts=(only,),
        default_passes=subject.teacher_steps,
        refused=whole.verdicts,
    )


def recompute(claimed: Verdict, where: Path, evidence: Path, params: Params) -> Verdict:
    """The verdict that follows from the file `evidence`; `claimed` is what the file `where` says.

    Raises InputMissing if there is no evidence, BadData if it is another file than the verdict names, or the
    verdict does not follow from it (numbers may differ by rounding, and by RTOL)."""
    if not evidence.is_file():
        raise InputMissing("E-INP-070", str(evidence), "is missing", REJUDGE)
    digest = artifacts.sha256_file(evidence)
    if digest != claimed.evidence_digest:
        problem = f"names evidence {claimed.evidence_digest[:12]}, {evidence} is {digest[:12]}"
        raise BadData("E-DAT-045", str(where), problem, REJUDGE)
    try:
        read = Evidence.load(evidence)
    except (SafetensorError, LookupError, TypeError, ValueError):
        raise BadData("E-DAT-046", str(evidence), "is no evidence of this version", REJUDGE) from None
    if read.description.subject is None:
        raise BadData("E-DAT-046", str(evidence), "does not say which models it is of", REJUDGE)
    verdict = build_verdict(estimates_of(read), digest, params)
    difference = next(_differences(claimed.to_json(), verdict.to_json()), None)
    if difference is not None:
        problem = f"does not follow from {evidence} and params.yaml: {difference}"
        raise BadData("E-DAT-045", str(where), problem, REJUDGE)
    return verdict


def _differences(claimed: Any, recomputed: Any, where: str = "") -> Iterator[str]:
    """Where two trees differ, as in `verdicts.0.rules.4.value is 0.1, recomputed 0.3`; reasons, which repeat
    numbers in words, are left out."""
    if isinstance(claimed, Mapping) and isinstance(recomputed, Mapping):
        for key in claimed:
            if key != "reason":
                yield from _differences(claimed[key], recomputed[key], f"{where}.{key}" if where else key)
    elif isinstance(claimed, list | tuple) and isinstance(recomputed, list | tuple):
        if len(claimed) != len(recomputed):
            yield f"{where} has {len(claimed)} entries, recomputed {len(recomputed)}"
            return
        for i, (mine, theirs) in enumerate(zip(claimed, recomputed, strict=True)):
            yield from _differences(mine, theirs, f"{where}.{i}")
    elif isinstance(claimed, float) and isinstance(recomputed, float):
        if not math.isclose(claimed, recomputed, rel_tol=RTOL, abs_tol=ATOL):
            yield f"{where} is {claimed:.6g}, recomputed {recomputed:.6g}"
    elif claimed != recomputed:
        yield f"{where} is {_shown(claimed)}, recomputed {_shown(recomputed)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text[:80]
