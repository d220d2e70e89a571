"""Where a registered version comes from, as a tree: from the registry alone, without the project that made it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.registry import champions
from pipeline.registry.history import when
from pipeline.registry.journal import DONE, Entry, Journal
from pipeline.registry.package import FROM_TAG, Registry, Version
from pipeline.registry.provenance import LINEAGE

Tree = dict[str, Any]  # a line to its children


def trace(root: Path, uri: str) -> dict[str, Any]:
    """Everything that the registry knows of the version at `uri`, as JSON values.

    Raises as `champions.resolve` does."""
    registry = Registry(root)
    version = champions.resolve(registry, uri)
    entries = Journal(registry, version.name).entries()
    aliases = registry.aliases(version.name)
    return {
        "version": version.uri,
        "aliases": sorted(alias for alias, number in aliases.items() if number == version.number),
        "digest": version.digest,
        "default_passes": version.default_passes,
        "created": version.created,
        "tags": dict(sorted(version.tags.items())),
        "journal": [_journal_of(entry) for entry in entries if _concerns(entry, version.number)],
        "lineage": read_lineage(registry, version),
    }


def read_lineage(registry: Registry, version: Version) -> dict[str, Any] | None:
    """What `provenance.py` stored with the version; None if it was registered before there was such a file."""
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        path = registry.file(version, f"artifacts/project/{LINEAGE}", Path(scratch))
        if path is None:
            return None
        lineage: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return lineage


def _concerns(entry: Entry, number: str) -> bool:
    moved = any(number in (move.before, move.after) for move in entry.moves)
    return entry.state == DONE and (moved or entry.registered.get("version") == number)


def _journal_of(entry: Entry) -> dict[str, Any]:
    return {
        "when": entry.created,
        "who": entry.who,
        "action": entry.action,
        "registered": entry.registered.get("version"),
        "moves": [asdict(move) for move in entry.moves],
    }


def draw(facts: Mapping[str, Any]) -> list[str]:
    """The lines of `crescendo trace`."""
    aliases = f" ({', '.join(facts['aliases'])})" if facts["aliases"] else ""
    default = facts["default_passes"]
    passes = f", default passes {default}" if default else ""
    lines = [f"{facts['version']}{aliases}  snapshot {_short(facts['digest'])}{passes}"]
    return lines + list(branches(_tree(facts)))


def _tree(facts: Mapping[str, Any]) -> Tree:
    tree: Tree = {f"registered  {when(facts['created'])}": {}}
    number = facts["version"].rpartition("/")[2]
    if FROM_TAG in facts["tags"]:
        tree[f"copied from  {facts['tags'][FROM_TAG]}"] = {}
    for entry in facts["journal"]:
        for move in entry["moves"]:
            gave = move["before"] == number
            what = (
                f"{move['alias']}: gave way to {move['after']}"
                if gave
                else f"{move['alias']}: {_before(move)}"
            )
            tree[f"{entry['action']}  {when(entry['when'])}  {entry['who']}  {what}"] = {}
    tree |= {f"served  {url}, by this machine": {} for url in facts.get("served", ())}
    tree |= _drills(facts["tags"])
    lineage = facts["lineage"]
    if lineage is None:
        tags = {key: value for key, value in facts["tags"].items() if not key.endswith("verdict_rules")}
        tree["lineage  not stored: registered by an earlier version of crescendo; its tags:"] = {
            f"{key.removeprefix('crescendo.')}  {value}": {} for key, value in tags.items()
        }
        return tree
    return tree | _code(lineage) | _model(lineage) | _verdict(lineage)


def _drills(tags: Mapping[str, str]) -> Tree:
    """The receipts that `crescendo drill --attach` left."""
    receipts = [json.loads(value) for key, value in tags.items() if key.startswith("crescendo.drill.")]
    outcome = {True: "passed", False: "FAILED"}
    return {
        f"drill  {each['stage']}: {outcome[each['passed']]}, {each['kills']} kills, profile {each['profile']}, "
        f"seed {each['seed']}, commit {_short(each['commit'])}": {}
        for each in receipts
    }


def _before(move: Mapping[str, Any]) -> str:
    return f"in place of {move['before']}" if move["before"] else "the first one"


def _code(lineage: Mapping[str, Any]) -> Tree:
    files: Tree = {f"{name}  sha256 {_short(digest)}": {} for name, digest in lineage["files"].items()}
    return {f"code  commit {_short(lineage['commit'] or 'unknown')}": files}


def _model(lineage: Mapping[str, Any]) -> Tree:
    """The model, and below it, what it was made from: refined, fine-tuned, core, data (once)."""
    by_output = {digest: stage for stage in lineage["stages"] for digest in stage["outputs"].values()}
    name, digest = lineage["model"]["folder"].removeprefix("models/"), lineage["model"]["digest"]
    return {f"model  {name} {_short(digest)}": _made(lineage, by_output, digest)}


def _made(lineage: Mapping[str, Any], by_output: Mapping[str, Any], digest: str) -> Tree:
    stage = by_output.get(digest)
    if stage is None:
        return {"made by  no run that the registry knew": {}}
    tree: Tree = {_run(stage): {}}
    models = {path: used for path, used in stage["inputs"].items() if path.startswith("models/")}
    for path, used in models.items():
        line = f"from  {path.removeprefix('models/')} {_short(used)}"
        tree[line] = _made(lineage, by_output, used)
    if not models and "data/prepared" in stage["inputs"]:
        tree |= _data(lineage, by_output, stage["inputs"]["data/prepared"])
    grown = lineage["grown_from"]
    if stage["stage"] == "finetune" and str(grown["address"]).startswith("models:"):
        tree[f"grown from  {grown['address']} {_short(grown['digest'])}"] = {}
    return tree


def _data(lineage: Mapping[str, Any], by_output: Mapping[str, Any], digest: str) -> Tree:
    known, stage = lineage["data"], by_output.get(digest)
    valid = known["validation"] if known["digest"] == digest else None
    line = f"data  {_short(digest)}" + (f", validation {_short(valid)}" if valid else "")
    if stage is None:
        return {line: {}}
    sources: Tree = {f"source  {path} {_short(used)}": {} for path, used in stage["inputs"].items()}
    return {line: {_run(stage): {}, **sources}}


def _run(stage: Mapping[str, Any]) -> str:
    ended = when(stage["ended"]) if stage["ended"] else stage["status"]
    return f"run  {stage['stage']} {stage['run_id']}  {ended}, commit {_short(stage['commit'] or 'unknown')}"


def _verdict(lineage: Mapping[str, Any]) -> Tree:
    verdict = lineage["verdict"]
    baseline = verdict["baseline"]
    head = f"verdict  against {baseline['address']} {_short(baseline['model_digest'])}"
    below: Tree = {f"evidence  {_short(verdict['evidence_digest'])}": {}}
    for stage in lineage["evaluation"]:
        below[f"run  evaluate {stage['run_id']}"] = {}
    refined = verdict["is_refined"]
    for refused in (True, False):
        for each in verdict["refused"] if refused else verdict["verdicts"]:
            unit = "passes" if refined or refused else "steps"
            rules: Tree = {_rule(rule): {} for rule in each["rules"]}
            below[f"{each['passes']} {unit} ({each['nfe']} calls)  {each['outcome']}"] = rules
    return {head: below}


def _rule(rule: Mapping[str, Any]) -> str:
    text = f"{rule['name']}  {rule['outcome']}"
    if rule["value"] is not None:
        text += f"  {rule['value']:.4g}"
    if rule["low"] is not None and rule["high"] is not None:
        text += f" [{rule['low']:.4g}, {rule['high']:.4g}]"
    return text + (f"  threshold {rule['threshold']:.4g}" if rule["threshold"] is not None else "")


def branches(tree: Tree, indent: str = "") -> Iterator[str]:
    """The lines of a tree."""
    for i, (line, below) in enumerate(tree.items()):
        last = i == len(tree) - 1
        yield f"{indent}{'└─ ' if last else '├─ '}{line}"
        yield from branches(below, indent + ("   " if last else "│  "))


def _short(digest: str | None) -> str:
    return str(digest)[:12]
