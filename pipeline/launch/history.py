"""The runs of a stage: what each was made from, what has changed since, and where a new one begins.

`runs/<stage>/<fingerprint>/made_from.json` holds what the fingerprint is the digest of, and the digests of single
files of code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.launch.continuation import continue_from
from pipeline.launch.fingerprint import is_code
from pipeline.training.records import read_records

MADE_FROM = "made_from.json"
STATES = ("result", "checkpoints", "*/checkpoints")  # in the folder of a run that has begun
NAMED = 4  # changes in a line


@dataclass(frozen=True)
class Run:
    """An earlier run of a stage: its folder, and what it was made from."""

    folder: Path
    made_from: Mapping[str, Any]

    def describe(self) -> str:
        """Where it lies, and how far it has come."""
        records = read_records(self.folder / "progress.jsonl")
        reached = f", at image {records[-1]['nimg']}" if records else ""
        state = "finished" if (self.folder / "result").exists() else f"unfinished{reached}"
        return f"{Path(*self.folder.parts[-3:])} ({state})"


def has_begun(run_dir: Path) -> bool:
    """Whether there is anything of a run to go on from, or a result."""
    return any(path for state in STATES for path in run_dir.glob(state))


def begin(stage: str, run_dir: Path, made_from: Mapping[str, Any]) -> str | None:
    """Record what a run is made from. A new one begins where it shares the state of one of another length. Returns
    what a user should know of that, or None. The run's lease must be held."""
    runs = [] if has_begun(run_dir) else sorted(_others(run_dir), key=_last_used, reverse=True)
    artifacts.write_atomic(run_dir / MADE_FROM, json.dumps(made_from))
    made_from = json.loads(json.dumps(made_from))
    for run in runs:
        changed = dict(changes(run.made_from, made_from))
        if changed and changed.keys() <= {f"{stage}.num_images", f"{stage}.core_images"}:
            sections = run.made_from["params"][stage], made_from["params"][stage]
            nimg = continue_from(run.folder, run_dir, *sections)
            if nimg is not None:
                origin = f"continues from image {nimg} of {run.describe()}, which is kept"
                return f"{stage}: {', '.join(changed.values())}; {origin}"
    begun = [run for run in runs if has_begun(run.folder)]
    if not begun:
        return None
    found = [text for _, text in changes(begun[0].made_from, made_from)]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{stage}: a new run for {', '.join(found[:NAMED])}{more}; left behind: {begun[0].describe()}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, words) of each parameter, input and file of code in which two runs differ."""
    params = [dict(leaves(each["params"])) for each in (old, new)]
    found = [(key, f"{key} {params[0].get(key)} -> {params[1].get(key)}") for key in _differing(*params)]
    inputs = [
        {path: digest for path, digest in each["deps"].items() if not is_code(path)} for each in (old, new)
    ]
    found += [(path, path) for path in [*_differing(*inputs), *_differing(old["files"], new["files"])]]
    if old["format"] != new["format"]:
        found.append(("format", "the format of checkpoints"))
    return found


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    missing = object()
    return [key for key in sorted({*old, *new}) if old.get(key, missing) != new.get(key, missing)]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as ("a.b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _others(run_dir: Path) -> Iterator[Run]:
    """Other runs of the stage that say what they were made from."""
    for path in run_dir.parent.glob(f"*/{MADE_FROM}"):
        if path.parent != run_dir:
            try:
                yield Run(path.parent, json.loads(path.read_text(encoding="utf-8")))
            except ValueError:  # damaged: nothing is known of this run
                continue


def _last_used(run: Run) -> float:
    return (run.folder / MADE_FROM).stat().st_mtime
