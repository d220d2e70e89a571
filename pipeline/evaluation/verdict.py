"""reports/verdict.json: what the evaluation decided about a refined model, for each number of passes.

`evaluate` writes it and `crescendo promote` reads it. An object that contradicts itself cannot be made, and a file
that does is refused. Needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pipeline.errors import BadData, InputMissing

Outcome = Literal["passed", "failed", "undecided"]
RuleOutcome = Outcome | Literal["not_applicable"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def combine(outcomes: Iterable[RuleOutcome]) -> Outcome:
    """Failed if any is failed, else undecided if any is undecided, else passed: what is not applicable does not
    count."""
    known = set(outcomes)
    return "failed" if "failed" in known else "undecided" if "undecided" in known else "passed"


def families_needed(families: int, value: float, low: float, high: float, threshold: float) -> float:
    """How many families would decide what an interval from `families` of them leaves open, since its width falls
    with the root of their number; infinite where the value is the threshold itself."""
    gap, half = abs(threshold - value), max(high - value, value - low)
    return families * (half / gap) ** 2 if gap else math.inf


@dataclass(frozen=True, config=STRICT)
class Rule:
    """One rule: its outcome and the numbers that it follows from; None where there is no such number.

    low, high: 95% interval of `value`. floor: what two sets of real images differ by. families: how many families
    of captions the interval comes from. reason: in words. training: half width of the 95% interval of values over
    seeds of training, where it is known; `low` and `high` are about the choice of captions and of noise alone.
    """

    name: Annotated[str, Field(min_length=1)]
    outcome: RuleOutcome
    value: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    floor: float | None = None
    families: Annotated[int, Field(ge=0)] | None = None
    reason: str | None = None
    training: Annotated[float, Field(ge=0)] | None = None

    def __str__(self) -> str:
        """As in `recall 0.5 [0.4, 0.6] (threshold 0.9): below 0.95 of the baseline's 0.947`."""
        numbers = "" if self.value is None else f" {self.value:.4g}"
        if self.value is not None and self.low is not None and self.high is not None:
            numbers += f" [{self.low:.4g}, {self.high:.4g}]"
        if self.value is not None and self.training is not None:
            numbers += f" \u00b1 {self.training:.2g} over seeds of training"
        if self.value is not None and self.threshold is not None:
            numbers += f" (threshold {self.threshold:.4g})"
        reason = (self.reason or "no reason given").removeprefix(f"{self.name}: ")
        return f"{self.name}{numbers}: {reason.removeprefix(f'{self.outcome}: ')}"


@dataclass(frozen=True, config=STRICT)
class PassVerdict:
    """The model with one number of passes, or of steps if it is not refined: the rules, and `combine` of their
    outcomes. nfe: calls per image."""

    passes: Positive
    nfe: Positive
    outcome: Outcome
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> PassVerdict:
        names = [rule.name for rule in self.rules]
        _require(len(set(names)) == len(names), "a rule is given twice")
        expected = combine(rule.outcome for rule in self.rules)
        _require(self.outcome == expected, f"outcome {self.outcome!r} does not follow from the rules")
        return self

    @property
    def obstacles(self) -> list[Rule]:
        """The rules because of which it did not pass: those that failed, else the undecided ones."""
        return [rule for rule in self.rules if rule.outcome == self.outcome != "passed"]


def count_of(passes: int) -> str:
    """`1 pass`, `2 passes`."""
    return "1 pass" if passes == 1 else f"{passes} passes"


def fewest_passed(verdicts: Sequence[PassVerdict]) -> int | None:
    """The fewest passes that passed; None if none did."""
    return min((each.passes for each in verdicts if each.outcome == "passed"), default=None)


@dataclass(frozen=True, config=STRICT)
class Baseline:
    """The model that the judged one was compared with: the digest of its snapshot, and models:/NAME/VERSION of a
    registered one, or a folder."""

    address: str
    model_digest: Digest

    @property
    def is_registered(self) -> bool:
        """Whether it is a version in the registry, and not the model that the judged one was refined from."""
        return self.address.startswith("models:/")


@dataclass(frozen=True, config=STRICT)
class Verdict:
    """The whole file. evidence_digest: of the measurements. is_refined: whether the judged model is a refined one;
    of the fine-tuned one, passes are steps. default_passes: `fewest_passed` of the verdicts. refused: the verdicts
    on the refined model where none passed, and the fine-tuned one is judged in its place."""

    data_digest: Digest
    model_digest: Digest
    evidence_digest: Digest
    baseline: Baseline
    is_refined: bool
    verdicts: Annotated[tuple[PassVerdict, ...], Field(min_length=1)]
    default_passes: int | None
    refused: tuple[PassVerdict, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Verdict:
        _require(not (self.refused and self.is_refined), "a refined model stands in for itself")
        _require(fewest_passed(self.refused) is None, "the refined model passed, and is replaced")
        passes = [each.passes for each in self.verdicts]
        _require(len(set(passes)) == len(passes), "a number of passes is given twice")
        follows = self.default_passes == fewest_passed(self.verdicts)
        _require(follows, f"default_passes {self.default_passes} does not follow from the verdicts")
        return self

    @property
    def outcome(self) -> Outcome:
        """Passed if any number of passes did, else undecided if any is, else failed."""
        if self.default_passes is not None:
            return "passed"
        return "undecided" if any(each.outcome == "undecided" for each in self.verdicts) else "failed"

    def title_of(self, each: PassVerdict) -> str:
        """What one of the verdicts is about: `2 passes`, or `the fine-tuned model in 12 calls`."""
        refined = self.is_refined or each in self.refused
        return count_of(each.passes) if refined else f"the fine-tuned model in {each.nfe} calls"

    def __str__(self) -> str:
        """As in `1 pass failed (recall: ...); 2 passes undecided (kid: 23 families, about 60 needed)`."""
        parts = []
        for each in (*self.refused, *self.verdicts):
            reasons = "; ".join(map(str, each.obstacles))
            parts.append(f"{self.title_of(each)} {each.outcome}" + (f" ({reasons})" if reasons else ""))
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Verdict:
        """Raises InputMissing if there is no file, BadData if it is no verdict or contradicts itself."""
        fix = "run `dvc repro evaluate`"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise InputMissing("E-INP-041", str(path), "is missing", fix) from None
        try:
            tree = json.loads(content)
        except (ValueError, RecursionError):
            raise BadData("E-DAT-044", str(path), "is not JSON", fix) from None
        if isinstance(tree, dict) and "passed" in tree:
            problem = "has the format of an earlier version of this project"
            raise BadData("E-DAT-044", str(path), problem, fix)
        try:
            return TypeAdapter(cls).validate_json(content)
        except ValidationError as error:
            raise BadData("E-DAT-044", str(path), _explain(error), fix) from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, as in `is not a verdict: verdicts.0.nfe: field required`."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        return f"contradicts itself: {where + ': ' if where else ''}{first['ctx']['error']}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"is not a verdict: {where + ': ' if where else ''}{message}"
