"""Sixteen promoters with checkouts of their own promote at once, round after round, and a checker looks 20 times a
second whether the champion verifies (looking.py).

A batch is some rounds on a fresh registered model. In each, the seed draws how many different models the checkouts
hold, whether they name the version that they expect, and which of them count as another machine's. One model wins
a round: the champion moves once, everybody else is refused, and no two versions are the same model.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.chaos import forks
from benchmarks.chaos.looking import look
from benchmarks.chaos.project import TEACHER, make_project, params_of, trusted
from benchmarks.chaos.results import Findings
from benchmarks.chaos.stores import Store
from pipeline.config.params import Params
from pipeline.errors import PipelineError
from pipeline.evaluation.verdict import Baseline
from pipeline.registry import journal
from pipeline.registry.journal import DONE, Journal
from pipeline.registry.package import CHAMPION, Registry
from pipeline.registry.promote import NOTHING, Request, promote
from pipeline.registry.repair import fsck, verify

PROMOTERS, ROUNDS = 16, 5
POLITE = 5  # added to the niceness of promoters, so that the checker keeps its rate where cores are few
LOST = ("E-BUSY-044", "E-GATE-002")  # how a promoter is told that another one was first
MODELS = (1, 2, 4, 8)  # different ones in a round


@dataclass(frozen=True)
class Round:
    """models: how many different ones the checkouts hold. expecting: whether they name the version that is the
    champion. elsewhere: which count as another machine's."""

    models: int
    expecting: bool
    elsewhere: frozenset[int]

    @classmethod
    def drawn(cls, draw: random.Random, promoters: int) -> Round:
        """A round by chance."""
        elsewhere = frozenset(draw.sample(range(promoters), promoters // 2))
        return cls(draw.choice(MODELS), draw.random() < 0.5, elsewhere)


@dataclass(frozen=True)
class State:
    """What the registry holds. versions: (number, digest, default passes). champions: the versions that the journal
    moved the alias to, in order."""

    champion: str | None
    versions: list[tuple[str, str | None, int | None]]
    champions: list[str]
    still_open: int


def race(
    seed: int, folder: Path, registry: Store, rounds: int = ROUNDS, promoters: int = PROMOTERS
) -> Findings:
    """One batch, in `folder`."""
    found, draw = Findings(), random.Random(f"race-{seed}")
    name, log = f"race-{seed}-{draw.randrange(16**6):06x}", folder / "log"
    checkouts = [folder / f"checkout-{i}" for i in range(promoters)]
    before: tuple[str, Baseline] = NOTHING, TEACHER
    make_project(folder / "observer", seed, name)
    stop = forks.CONTEXT.Event()
    arguments = {"log": log, "environment": registry.environment}
    checker = forks.start(look, folder / "observer", name, registry, stop, **arguments)
    try:
        for number in range(rounds):
            plan = Round.drawn(draw, promoters)
            for i, checkout in enumerate(checkouts):
                make_project(checkout, 1000 * seed + 100 * number + i % plan.models, name, before[1])
            outcomes = run_round(checkouts, plan, before[0], **arguments)
            state = forks.call(state_of, folder / "observer", name, **arguments)
            judge_round(found, f"seed {seed}, round {number}", number, plan, outcomes, state)
            digest = {each[0]: each[1] for each in state.versions}.get(str(state.champion))
            if digest is None:  # nobody won, which is among the failures
                break
            before = str(state.champion), Baseline(f"models:/{name}/{state.champion}", digest)
        found.counts["versions"] += len(state.versions)
    finally:
        stop.set()
    looks = checker.result()
    found.counts |= Counter(
        {"looks": looks.count, "s of looking": round(looks.seconds), "looks as users": looks.as_users}
    )
    found.failures += [f"seed {seed}, checker: {line}" for line in looks.broken]
    for line in forks.call(last_words, folder / "observer", name, **arguments):
        found.require(False, f"seed {seed}, fsck: {line}")
    return found


def run_round(checkouts: Sequence[Path], plan: Round, expect: str, **arguments: Any) -> list[str]:
    """Promote in all checkouts at once; of each `champion`, or the code of its error."""
    barrier = forks.CONTEXT.Barrier(len(checkouts))
    expected, params = expect if plan.expecting else None, params_of(checkouts[0])
    children = [
        forks.start(promote_once, checkout, params, expected, barrier, i in plan.elsewhere, **arguments)
        for i, checkout in enumerate(checkouts)
    ]
    return [child.result() for child in children]


def judge_round(
    found: Findings, where: str, number: int, plan: Round, outcomes: Sequence[str], state: State
) -> None:
    """Whether a round kept its promises."""
    won = outcomes.count(CHAMPION)
    found.counts["rounds"] += 1
    found.counts["promotions"] += len(outcomes)
    found.counts["refused"] += sum(outcome in LOST for outcome in outcomes)
    identities = [version[1:] for version in state.versions]
    found.require(won == 1 if plan.expecting else won >= 1, f"{where}: {won} won of {Counter(outcomes)}")
    strange = [outcome for outcome in outcomes if outcome not in (CHAMPION, *LOST)]
    found.require(not strange, f"{where}: {strange}")
    found.require(len(state.champions) == number + 1, f"{where}: the champion moved {state.champions}")
    found.require(state.champion in state.champions[-1:], f"{where}: {state.champion} is not the last one")
    found.require(len(identities) == len(set(identities)), f"{where}: one model is two versions")
    found.require(state.still_open == 0, f"{where}: {state.still_open} entries of the journal are open")


def promote_once(checkout: Path, params: Params, expect: str | None, barrier: Any, elsewhere: bool) -> str:
    """Promote when all others do. elsewhere: as from a machine that cannot see whether others' processes live."""
    here = journal.this_process()
    process = here[::-1] if elsewhere else here
    os.nice(POLITE)
    barrier.wait()
    with trusted(), mock.patch.object(journal, "this_process", lambda: process):
        try:
            promote(checkout, params, Request(expect=expect), log=lambda line: None)
        except PipelineError as error:
            return error.code if error.code in LOST else str(error)
    return CHAMPION


def state_of(root: Path, name: str) -> State:
    """What the registry holds."""
    registry = Registry(root)
    entries = Journal(registry, name).entries()
    moved = [move.after for entry in entries for move in entry.moves if move.alias == CHAMPION]
    versions = [(each.number, each.digest, each.default_passes) for each in registry.versions(name)]
    unsettled = sum(entry.state != DONE for entry in entries)
    return State(registry.aliases(name).get(CHAMPION), versions, moved, unsettled)


def last_words(root: Path, name: str) -> list[str]:
    """What is wrong with the registry after all: of `verify --all`, and what `fsck` finds to tidy."""
    lines: list[str] = []
    try:
        verify(root, name, everything=True, log=lambda line: None)
    except PipelineError as error:
        lines.append(str(error))
    fsck(root, name, lines.append)
    return [line for line in lines if "nothing was left behind" not in line]
