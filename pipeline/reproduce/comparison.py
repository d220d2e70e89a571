"""Whether bits are equal, and if not, which stage first differs and by what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifacts
from pipeline.errors import PipelineError
from pipeline.launch.machine import Facts

KINDS = {
    "python": "another Python",
    "torch": "another library",
    "processor": "another processor",
    "device": "another processor",
    "instructions": "another processor",
    "precision": "another compute profile",
    "compile": "another compute profile",
    "settings": "another setting",
}
UNKNOWN = "cause unknown"
SHOWN = 5  # packages or files in a line


class Cause(NamedTuple):
    """What was different. kind: in a word or two."""

    kind: str
    what: str


@dataclass(frozen=True)
class Output:
    """An output of a stage: its digest in the version (None: unknown), and now. parts: the files that differ,
    and by how much, where the former content is at hand."""

    path: str
    expected: str | None
    found: str
    parts: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether bits are not those of the version."""
        return self.expected is not None and self.expected != self.found


@dataclass(frozen=True)
class Outcome:
    """A stage that was run again. seconds: now, and in the version's run (None: unknown). causes: where it
    differs."""

    stage: str
    seconds: float
    seconds_then: float | None
    outputs: tuple[Output, ...]
    causes: tuple[Cause, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether an output does."""
        return any(output.differs for output in self.outputs)


@dataclass(frozen=True)
class Report:
    """What became of a version that was made again. The stages after the first that differs are not run."""

    version: str
    digest: str
    commit: str
    environment: str
    inputs: Mapping[str, str]
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether all stages made what they had made."""
        return not any(outcome.differs for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        first = next((outcome for outcome in self.outcomes if outcome.differs), None)
        causes = [cause._asdict() for cause in first.causes] if first else []
        return {
            "version": self.version,
            "digest": self.digest,
            "commit": self.commit,
            "outcome": "identical" if self.identical else "differs",
            "first": first and first.stage,
            "causes": causes,
            "environment": self.environment,
            "inputs": dict(self.inputs),
            "stages": [
                asdict(outcome) | {"causes": [c._asdict() for c in outcome.causes]}
                for outcome in self.outcomes
            ],
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for outcome in self.outcomes:
            then = outcome.seconds_then
            took = f"{outcome.seconds:.0f} s" + (f", the first time {then:.0f} s" if then is not None else "")
            for output in outcome.outputs:
                yield f"{outcome.stage:12} {output.path} {_compared(output)}  ({took})"
                yield from (f"{'':12}   {part}" for part in output.parts)
            if outcome.differs:
                yield f"differs: {outcome.stage} is the first stage that does"
                yield from (f"  {cause.kind}: {cause.what}" for cause in outcome.causes)
        if self.identical:
            yield "identical"


def _compared(output: Output) -> str:
    if output.expected is None:
        return f"{output.found[:12]}, which the version does not tell"
    same = f"{output.found[:12]} identical"
    return f"{output.found[:12]} differs from {output.expected[:12]}" if output.differs else same


def causes(
    then: Facts, now: Facts, pins: Mapping[str, str], inputs: Sequence[str], changed: Sequence[str]
) -> tuple[Cause, ...]:
    """What is known to be different. then, now: facts of a stage (launch/machine.py). pins: packages of the
    version's lock. inputs: those with other content. changed: code and parameters that are not those of its
    dvc.lock."""
    found = [Cause("other data", f"{path} is not what the version was made from") for path in inputs]
    found += [Cause("other code", f"{name} is not what dvc.lock of the version has") for name in changed]
    packages = list(_packages(then, now, pins))
    if packages:
        more = f" and {len(packages) - SHOWN} more" if len(packages) > SHOWN else ""
        found.append(Cause("another library", ", ".join(packages[:SHOWN]) + more))
    for name, kind in KINDS.items():
        before, here = then.get(name, ""), now.get(name, "")
        known = name in then or (name == "settings" and then)
        if known and before != here and not (name == "torch" and packages):
            found.append(Cause(kind, f"{name} is {here or 'none'}, was {before or 'none'}"))
    if not then:
        found.append(
            Cause(UNKNOWN, "the version does not say on which processor this stage ran, and with what")
        )
    elif not found:
        found.append(Cause(UNKNOWN, "data, code, libraries, processor and settings are those of the version"))
    return tuple(found)


def _packages(then: Facts, now: Facts, pins: Mapping[str, str]) -> Iterator[str]:
    """`name is X, was Y` of each package that is another; what is not listed is as in the lock."""
    before, here = (_listed(facts.get("packages", "{}")) for facts in (then, now))
    for name in sorted({*before, *here}):
        versions = [each.get(name, pins.get(name, "missing")) for each in (here, before)]
        if versions[0] != versions[1]:
            yield f"{name} is {versions[0]}, was {versions[1]}"


def _listed(text: str) -> dict[str, str]:
    try:
        return dict(json.loads(text))
    except ValueError:  # of a run that went on in another environment
        return {"packages": text}


def differing_parts(ours: Path, theirs: Path) -> tuple[str, ...]:
    """The files of two artifact folders that differ, and the largest difference of a weight of models."""
    try:
        files = [artifacts.read_manifest(folder)["files"] for folder in (ours, theirs)]
    except PipelineError:
        return ()
    names = sorted({*files[0], *files[1]})
    differ = [name for name in names if files[0].get(name) != files[1].get(name)]
    if not differ:
        return ("only in what the manifest says of it",)
    shown = tuple(differ[:SHOWN]) + ((f"and {len(differ) - SHOWN} more",) if len(differ) > SHOWN else ())
    weights = "model.safetensors"
    if weights in differ and weights in files[0] and weights in files[1]:
        shown = tuple(
            f"{name}: {_distance(ours / name, theirs / name)}" if name == weights else name for name in shown
        )
    return shown


def _distance(ours: Path, theirs: Path) -> str:
    from safetensors.torch import load_file

    first, second = load_file(ours), load_file(theirs)
    if {name: each.shape for name, each in first.items()} != {
        name: each.shape for name, each in second.items()
    }:
        return "another network"
    largest = max((second[name].double() - first[name].double()).abs().max().item() for name in first)
    scale = max(each.double().abs().max().item() for each in second.values())
    return f"weights differ by {largest:.1e} at most, the largest is {scale:.1e}"
