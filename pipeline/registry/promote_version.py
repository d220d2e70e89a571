"""Promotion of a version that is registered already, such as one that was copied from a staging server: by the
evidence that is stored with it, from the registry alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.config.params import Params, load_params
from pipeline.errors import Busy, GateFailed
from pipeline.evaluation.verdict import Verdict
from pipeline.registry import champions, judgement
from pipeline.registry.journal import Journal
from pipeline.registry.package import CANDIDATE, IDENTITY, Registry, Version
from pipeline.registry.promote import (
    NOTHING,
    Log,
    Request,
    check_expected,
    current_champion,
    move_alias,
)


def promote_version(root: Path, address: str, request: Request | None = None, log: Log = print) -> bool:
    """Make the version at `address` (models:/NAME/3, or an alias) the candidate, and move the alias to it if its
    verdict, computed again from its evidence, passed against the current champion; where there never was one,
    against whatever it was compared with.

    Returns as `promote` does. Raises as `judgement.verdict_of` does, and:
        InputMissing: there is no such version, or the champion was deleted.
        GateFailed: the verdict did not pass, or compares with another model (the version stays the candidate).
        Busy: the alias is not at the expected version.
    """
    request, registry = request or Request(), Registry(root)
    version = champions.resolve(registry, address)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        verdict = judgement.verdict_of(
            registry, version, Path(folder) / "judged", _limits(root, version.name)
        )
        log(f"version {version.number} verifies, and its verdict follows from its evidence")
        if request.dry_run:
            check_expected(registry, version.name, request)
            refusal = _preview(registry, version, verdict, request, log)
        else:
            refusal = _promote(registry, version, verdict, request, Path(folder) / "again", log)
    if refusal is not None and not request.allow_candidate:
        raise refusal
    if refusal is not None:
        log(refusal.problem)
    return refusal is None


def _promote(
    registry: Registry, judged: Version, verdict: Verdict, request: Request, scratch: Path, log: Log
) -> GateFailed | None:
    """Move the aliases to the version that was judged, if it is still what it was."""
    with Journal(registry, judged.name).turn("promote", log) as turn:
        check_expected(registry, judged.name, request)
        version = registry.version(judged.name, judged.number)
        if any(version.tags.get(tag) != judged.tags.get(tag) for tag in IDENTITY):
            problem = "its tags were changed while it was judged"
            raise Busy("E-BUSY-190", version.uri, problem, "see `crescendo verify --all`, then run it again")
        registry.verify(version, scratch)
        for alias in dict.fromkeys((CANDIDATE, request.alias)):
            refusal = _refusal(registry, version, verdict, alias)
            if refusal is not None:
                return refusal
            move_alias(registry, turn, version, alias, log)
    return None


def _preview(
    registry: Registry, version: Version, verdict: Verdict, request: Request, log: Log
) -> GateFailed | None:
    refusal = _refusal(registry, version, verdict, request.alias)
    if refusal is None:
        before = registry.aliases(version.name).get(request.alias)
        log(f"would move {request.alias} from version {before or NOTHING} to {version.number}")
    return refusal


def _refusal(registry: Registry, version: Version, verdict: Verdict, alias: str) -> GateFailed | None:
    """Why the version does not get `alias`; None if it does."""
    if alias == CANDIDATE:
        return None
    stays = f"it does not become {alias}"
    if verdict.outcome != "passed":
        fix = "promote another version, or accept the candidate with --allow-candidate"
        return GateFailed("E-GATE-191", version.uri, f"{stays}: {verdict}", fix)
    current = current_champion(registry, version.name)
    if current is None or current.digest in (verdict.baseline.model_digest, verdict.model_digest):
        return None
    compared = f"{verdict.baseline.address or 'the fine-tuned model'} ({verdict.baseline.model_digest[:12]})"
    problem = f"{stays}: it was compared with {compared}, and the champion is version {current.number}"
    fix = (
        f"copy and promote what it was compared with first; or in its project, with this registry, run "
        f"`crescendo pin --baseline {current.uri}`, `dvc repro evaluate`, `crescendo promote`"
    )
    return GateFailed("E-GATE-192", version.uri, problem, fix)


def _limits(root: Path, name: str) -> Params | None:
    """The parameters of the project at `root`, if it is one that registers models of this name."""
    if not (root / "params.yaml").is_file():
        return None
    params = load_params(root / "params.yaml")
    return params if params.promotion.name == name else None
