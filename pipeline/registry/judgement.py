"""The verdict on a registered version, from the evidence that is stored with it: without the project that made it.

Nothing that the registry says is taken on trust. All files are verified against the digest of the registration, and
the verdict is computed again from its evidence and the limits in the version's own params.yaml.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config.params import Params, load_params
from pipeline.errors import BadData, GateFailed, InputMissing, PipelineError, StorageError, one_line
from pipeline.evaluation.verdict import Verdict
from pipeline.registry.journal import Journal, changed_tag
from pipeline.registry.package import Registry, Version
from pipeline.registry.packaging import PROJECT
from pipeline.registry.provenance import EVIDENCE_COPY, FILES, VERDICT_COPY

PARAMS = FILES[0]


def verdict_of(registry: Registry, version: Version, scratch: Path, here: Params | None = None) -> Verdict:
    """The verdict on `version`, whose files are fetched into `scratch` if they are not on this machine.

    here: parameters whose limits a passing version has to pass as well, where they are others.

    Raises:
        StorageError: files or tags are not those of the registration.
        InputMissing: it was registered without evidence.
        BadData: the verdict does not follow from the evidence, or is about another model.
        GateFailed: it does not pass by the limits here.
    """
    problem = changed_tag(version, Journal(registry, version.name).entries())
    if problem is not None:
        raise StorageError("E-IO-191", version.uri, problem, "copy it again from the store that it came from")
    project = registry.verify(version, scratch) / "artifacts" / PROJECT
    claimed, evidence = project / VERDICT_COPY, project / EVIDENCE_COPY
    if not claimed.is_file() or not evidence.is_file():
        problem = "no evidence is stored with it"
        raise InputMissing("E-INP-190", version.uri, problem, "promote it from the project that made it")
    from pipeline.evaluation.judging import recompute, thresholds_of

    try:
        params = load_params(project / PARAMS)
        verdict = recompute(Verdict.read(claimed), claimed, evidence, params)
    except PipelineError as error:
        problem = f"its verdict does not hold: {one_line(error.problem)}"
        raise BadData(
            "E-DAT-190", version.uri, problem, "promote it from the project that made it"
        ) from error
    found = (verdict.model_digest, verdict.default_passes)
    if found != (version.digest, version.default_passes):
        problem = f"its verdict is about {found[0][:12]} with default passes {found[1]}"
        raise BadData("E-DAT-191", version.uri, problem, "promote it from the project that made it")
    if here is not None and thresholds_of(here.promotion) != thresholds_of(params.promotion):
        _require_passed_here(version, verdict, evidence, here)
    return verdict


def _require_passed_here(version: Version, verdict: Verdict, evidence: Path, here: Params) -> None:
    """Raise GateFailed where a version that passed by its own limits, does not by those of `here`."""
    from pipeline.evaluation.estimates import estimates_of
    from pipeline.evaluation.evidence import Evidence
    from pipeline.evaluation.judging import build_verdict

    again = build_verdict(estimates_of(Evidence.load(evidence)), verdict.evidence_digest, here)
    passed = {each.passes for each in again.verdicts if each.outcome == "passed"}
    if verdict.default_passes is not None and verdict.default_passes not in passed:
        problem = f"it passed by its own limits, not by those of params.yaml here: {again}"
        fix = "promote a version that does, or restore the limits in params.yaml"
        raise GateFailed("E-GATE-190", version.uri, problem, fix)
