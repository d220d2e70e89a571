"""Promotion: register the judged model, and make it the champion if its verdict passed against the champion.

What a promotion relies on is checked again: the model against its manifest, the verdict against its evidence
(`evaluation/judging.py`), the registered files against the digests of their registration, and the alias against
the version that it pointed to. Checkouts and machines that share a registry take turns (journal.py). It may be
interrupted anywhere and run again; `crescendo fsck` tidies up. Where refinement gained nothing, models/refined is
the fine-tuned model; where the refined model did not pass and there is no champion yet, the verdict may be about
models/finetuned.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts
from pipeline.config.params import Params
from pipeline.errors import BadData, Busy, GateFailed
from pipeline.evaluation.verdict import Verdict
from pipeline.registry import card, champions, lineage, provenance, registration
from pipeline.registry.journal import Journal, Turn
from pipeline.registry.package import CANDIDATE, CHAMPION, Registry, Version
from pipeline.registry.packaging import CARD, PROJECT, defaults
from pipeline.registry.provenance import EVIDENCE, VERDICT
from pipeline.tracking import store

if TYPE_CHECKING:
    from pipeline.models.config import SnapshotConfig

MODEL = "models/refined"
MODELS = (MODEL, "models/finetuned")  # that a verdict may be about
LOCK = "runs/promote.lock"
SCRATCH = "runs/promote"
NOTHING = "none"  # as an expected version: there is no such alias

Log = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for. alias: to be moved if the verdict passed; CANDIDATE needs none. expect: the version that
    `alias` has to point to, or NOTHING. allow_candidate: that it stays the candidate is no error."""

    alias: str = CHAMPION
    expect: str | None = None
    dry_run: bool = False
    allow_candidate: bool = False


@dataclass(frozen=True)
class Judged:
    """A model folder with its config, and the verdict on it."""

    folder: str
    config: SnapshotConfig
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.folder} ({self.verdict.model_digest[:12]})"


def promote(root: Path, params: Params, request: Request | None = None, log: Log = print) -> bool:
    """Register the judged model (`models/refined`, or `models/finetuned` where the refined one did not pass) under
    `promotion.name` as the candidate; move the alias to it if its verdict passed.

    A verdict counts only if it compares with the current champion, unless that is the same model.
    Returns whether the alias points to the model now (with `dry_run`: would); False only with `allow_candidate`.

    Raises:
        GateFailed: the verdict did not pass, or compares with another model (the model stays the candidate).
        InputMissing, StorageError, BadData: model, verdict or evidence is missing, damaged, or they do not match;
            InputMissing also where the champion was deleted.
        Busy: another promotion is running here, or the alias is not at the expected version.
    """
    request = request or Request()
    with artifacts.lease(root / LOCK):
        judged = _read_judged(root, _read_verdict(root, params))
        if request.dry_run:
            refusal = _preview(root, params.promotion.name, judged, request, log)
        else:
            refusal = _promote(root, params.promotion.name, judged, request, log)
    if refusal is not None and not request.allow_candidate:
        raise refusal
    if refusal is not None:
        log(refusal.problem)
    return refusal is None


def _promote(root: Path, name: str, judged: Judged, request: Request, log: Log) -> GateFailed | None:
    registry, journal = Registry(root), Journal(Registry(root), name)
    with _scratch(root) as folder, journal.turn("promote", log) as turn:
        scratch = Path(folder)
        check_expected(registry, name, request)
        version = _find_or_register(registry, turn, name, root, judged, scratch, log)
        registry.verify(version, scratch)
        for alias in dict.fromkeys((CANDIDATE, request.alias)):
            refusal = _refusal(registry, name, version.number, judged.verdict, alias)
            if refusal is not None:
                return refusal
            move_alias(registry, turn, version, alias, log)
    return None


def _preview(root: Path, name: str, judged: Judged, request: Request, log: Log) -> GateFailed | None:
    """Say what `_promote` would do; nothing is written."""
    if not store.store_exists(root):
        log(f"would register {judged} as version 1 of {name}")
        return _refusal(None, name, "1", judged.verdict, request.alias)
    registry, verdict = Registry(root), judged.verdict
    check_expected(registry, name, request)
    with _scratch(root) as folder:
        found = registration.find(registry, name, verdict.model_digest, verdict.default_passes, Path(folder))
        if found is None:
            log(f"would register {judged} as a new version of {name}")
        else:
            registry.verify(found, Path(folder))
            log(f"{judged} already is version {found.number} of {name}, and verifies")
    number = "(new)" if found is None else found.number
    refusal = _refusal(registry, name, number, verdict, request.alias)
    if refusal is None:
        before = registry.aliases(name).get(request.alias)
        log(f"would move {request.alias} from version {before or NOTHING} to {number}")
    return refusal


def _scratch(root: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder of the checkout, whose promotions run one at a time: what a killed one left is removed."""
    folder = root / SCRATCH
    if folder.exists():
        artifacts.remove(folder)
    folder.mkdir(parents=True)
    return tempfile.TemporaryDirectory(dir=folder)


def _read_verdict(root: Path, params: Params) -> Verdict:
    """The verdict, judged again from its evidence."""
    claimed = Verdict.read(root / VERDICT)
    from pipeline.evaluation.judging import recompute

    return recompute(claimed, root / VERDICT, root / EVIDENCE, params)


def _read_judged(root: Path, verdict: Verdict) -> Judged:
    """The one of MODELS that the verdict is about."""
    found = {}
    for model in MODELS:
        if model == MODEL or (root / model).is_dir():
            found[model], config = _read_model(root / model)
            if found[model] == verdict.model_digest:
                return Judged(model, config, verdict)
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


def check_expected(registry: Registry, name: str, request: Request) -> None:
    """Raise Busy unless the alias that is to be moved is where it is expected."""
    number = registry.aliases(name).get(request.alias, NOTHING)
    if request.expect not in (None, number):
        problem = f"points to version {number}, {request.expect} was expected"
        fix = f"see `crescendo history`, and run it with `--expect {number}` if that is meant"
        raise Busy("E-BUSY-044", f"models:/{name}@{request.alias}", problem, fix)


def _find_or_register(
    registry: Registry, turn: Turn, name: str, root: Path, judged: Judged, scratch: Path, log: Log
) -> Version:
    """The version of the judged model, registered if there is none yet."""
    verdict = judged.verdict
    digest, default, tags = verdict.model_digest, verdict.default_passes, lineage.verdict_tags(verdict)
    version = registration.find(registry, name, digest, default, scratch)
    if version is not None:
        log(f"{judged} already is version {version.number} of {name}")
        version = registration.restore_tags(registry, version, digest, default, log)
        registry.set_tags(version, tags)
        return version
    with registry.failing():
        tags = lineage.lineage_tags(root, judged.folder, judged.config.lineage, verdict) | tags
    project = scratch / PROJECT
    provenance.copy_files(root, project)
    provenance.copy_films(root, judged.folder, project)
    with registry.failing():
        provenance.write_lineage(
            project, root, judged.folder, judged.config.lineage, verdict, *registry.connection
        )
    provenance.copy_evidence(root, verdict, project)
    facts = json.loads((project / provenance.LINEAGE).read_text(encoding="utf-8"))
    params = defaults(judged.config, default)
    subject = card.Subject(name, root / judged.folder, judged.config, verdict, facts, params)
    card.write_card(scratch / CARD, root, subject)
    version = registration.register(registry, turn, name, root / judged.folder, project, tags, default)
    log(f"registered {judged} as version {version.number} of {name}")
    return version


def _refusal(
    registry: Registry | None, name: str, number: str, verdict: Verdict, alias: str
) -> GateFailed | None:
    """Why version `number` does not get `alias`; None if it does. Without a registry, there is no champion."""
    if alias == CANDIDATE:
        return None
    stays = f"version {number} of {name} stays the candidate"
    if verdict.outcome != "passed":
        problem = f"{stays}: {verdict}"
        fix = "see reports/evaluation/index.html, or accept the candidate with --allow-candidate"
        return GateFailed("E-GATE-001", VERDICT, problem, fix)
    current = None if registry is None else current_champion(registry, name)
    baseline = verdict.baseline
    if current is None and not baseline.is_registered:
        return None
    if current is not None and current.digest in (baseline.model_digest, verdict.model_digest):
        return None
    known = "there is no champion" if current is None else f"the champion is version {current.number}"
    compared = baseline.address or "the fine-tuned model"
    problem = f"{stays}: it was compared with {compared} ({baseline.model_digest[:12]}), and {known}"
    address = "teacher" if current is None else current.uri
    fix = f"run `crescendo pin --baseline {address}`, then `dvc repro evaluate`"
    return GateFailed("E-GATE-002", VERDICT, problem, fix)


def current_champion(registry: Registry, name: str) -> Version | None:
    """The champion. Raises InputMissing where it is gone, and there is one to return to."""
    number = registry.aliases(name).get(CHAMPION)
    if number is not None:
        return registry.version(name, number)
    gone = champions.find_gone(registry, name, CHAMPION)
    if gone is not None and gone.back is not None:
        raise champions.gone_error(name, CHAMPION, gone)
    return None


def move_alias(registry: Registry, turn: Turn, version: Version, alias: str, log: Log) -> None:
    """Move an alias to `version`, and tag a champion with the version that it replaced."""
    before = registry.aliases(version.name).get(alias)
    article = "the champion" if alias == CHAMPION else f"at {alias}"
    if before == version.number:
        if alias != CANDIDATE:
            log(f"version {version.number} already is {article}")
        return
    turn.move(alias, before, version)
    if alias == CHAMPION and before is not None:
        registry.set_tags(version, {"crescendo.replaced": before})
    if alias != CANDIDATE:
        log(f"version {version.number} is {article}" + (f", in place of {before}" if before else ""))
