"""A promotion, a rollback and `fsck` die at each of their steps, and what they leave is tidied up.

A batch is some crashes, one after another, on one registered model, at steps that the seed draws: in turns of files
and of the registry, each from another part of them. Before anybody tidies up, the champion is the one before or the
one after, and verifies. After `fsck`, which half of the time is killed itself first, nothing is left, a second
`fsck` finds nothing, and the promotion that died ends with its model as the champion and as one version.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.chaos import forks
from benchmarks.chaos.forks import Killed
from benchmarks.chaos.project import TEACHER, make_project, params_of, trusted
from benchmarks.chaos.results import Findings
from benchmarks.chaos.steps import watched
from benchmarks.chaos.stores import Store
from pipeline.errors import PipelineError
from pipeline.evaluation.verdict import Baseline
from pipeline.registry import champions
from pipeline.registry.journal import Journal
from pipeline.registry.package import CANDIDATE, CHAMPION, NAME_TAG, Registry
from pipeline.registry.promote import promote
from pipeline.registry.repair import fsck, verify

CRASHES = 20
NOTHING_LEFT = "nothing was left behind"
PROMOTE, ROLLBACK, FSCK = "promote", "rollback", "fsck"


@dataclass(frozen=True)
class State:
    """Number and digest of the champion. problems: what does not verify, is left open or is there twice."""

    champion: str | None
    digest: str | None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Attack:
    """A registered model that is attacked from one checkout."""

    found: Findings
    checkout: Path
    name: str
    store: Store
    log: Path

    def call(self, function: Any, *arguments: object) -> Any:
        """Run a function of (checkout, name, ...) in a fork."""
        environment = self.store.environment
        return forks.call(
            function, self.checkout, self.name, *arguments, log=self.log, environment=environment
        )

    def dies(self, action: str, step: int) -> bool:
        """Do something that is killed before a step; False where it ended before."""
        try:
            self.call(act, action, step)
        except Killed:
            self.found.counts[f"{action} killed"] += 1
            return True
        self.found.counts["ended before"] += 1
        return False


def crash(seed: int, folder: Path, store: Store, crashes: int = CRASHES) -> Findings:
    """One batch, in `folder`."""
    draw = random.Random(f"crash-{seed}")
    name = f"crash-{seed}-{draw.randrange(16**6):06x}"
    attack = Attack(Findings(), folder / "checkout", name, store, folder / "log")
    make_project(attack.checkout, 1000 * seed, name)
    attack.call(act, PROMOTE, None)
    champion: State = attack.call(state_of)
    new_model(attack, 1000 * seed + 1, champion)
    steps = {action: attack.call(act, action, None) for action in (PROMOTE, ROLLBACK)}
    for i in range(crashes):
        action = ROLLBACK if i % 5 == 4 else PROMOTE
        step = chosen(steps[action], i % 2 == 0, (i + draw.random()) / crashes)
        crash_once(attack, action, step, 1000 * seed + 10 + i, draw)
    return attack.found


def chosen(steps: Sequence[str], of_files: bool, place: float) -> int:
    """The number of a step of files, or of the registry, at a place in [0, 1) among them."""
    numbers = [i for i, name in enumerate(steps) if name.startswith(("open", "os.")) == of_files]
    return numbers[int(place * len(numbers))] if numbers else int(place * len(steps))


def new_model(attack: Attack, seed: int, champion: State) -> str:
    """Give the checkout another model, judged against the champion."""
    baseline = Baseline(f"models:/{attack.name}/{champion.champion}", str(champion.digest))
    return make_project(attack.checkout, seed, attack.name, baseline if champion.champion else TEACHER)


def crash_once(attack: Attack, action: str, step: int, seed: int, draw: random.Random) -> None:
    """One crash, of the promotion of the model of `seed` or of a rollback, and what follows it."""
    found, where = attack.found, f"{attack.name}, {action}, step {step}"
    before: State = attack.call(state_of)
    new = new_model(attack, seed, before) if action == PROMOTE else None
    attack.dies(action, step)
    after: State = attack.call(state_of)
    found.require(after.champion is not None, f"{where}: there is no champion")
    if new is not None:
        found.require(after.digest in (before.digest, new), f"{where}: the champion is another model")
    found.failures += [f"{where}, before fsck: {line}" for line in after.problems if "champion" in line]
    if draw.random() < 0.5:
        attack.dies(FSCK, draw.randrange(40))
    attack.call(act, FSCK, None)
    tidy: State = attack.call(tidied)
    found.require(tidy.champion == after.champion, f"{where}: fsck moved the champion")
    found.failures += [f"{where}, after fsck: {line}" for line in tidy.problems]
    if action == PROMOTE:
        attack.call(act, PROMOTE, None)
        again: State = attack.call(tidied)
        found.require(again.digest == new, f"{where}: promoting again did not promote")
        found.failures += [f"{where}, promoted again: {line}" for line in again.problems]


def act(checkout: Path, name: str, action: str, step: int | None) -> list[str]:
    """Do something, or die before a step of it; the names of its steps."""
    lines: list[str] = []

    def done() -> None:
        if action == PROMOTE:
            promote(checkout, params_of(checkout), log=lines.append)
        elif action == ROLLBACK:
            champions.rollback(checkout, name, log=lines.append)
        else:
            fsck(checkout, name, log=lines.append)

    with trusted():
        return watched(done, step)


def state_of(checkout: Path, name: str) -> State:
    """The champion, and what is wrong with it."""
    registry, problems = Registry(checkout), []
    version = None
    try:
        version = champions.resolve(registry, f"models:/{name}@{CHAMPION}")
        with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
            registry.verify(version, Path(scratch))
    except PipelineError as error:
        problems.append(f"champion: {error}")
    number, digest = (version.number, version.digest) if version else (None, None)
    return State(number, digest, problems)


def tidied(checkout: Path, name: str) -> State:
    """The champion, and all that is wrong, and was not tidied up."""
    state = state_of(checkout, name)
    problems = [*state.problems, *left_behind(Registry(checkout), name), *unverified(checkout, name)]
    return replace(state, problems=problems)


def unverified(checkout: Path, name: str) -> list[str]:
    """What `verify --all` and a second `fsck` say."""
    lines: list[str] = []
    fsck(checkout, name, lines.append)
    problems = [f"a second fsck: {line}" for line in lines if NOTHING_LEFT not in line]
    try:
        verify(checkout, name, everything=True, log=lambda line: None)
    except PipelineError as error:
        problems.append(str(error))
    return problems


def left_behind(registry: Registry, name: str) -> list[str]:
    """Open entries, running runs, logged models without a version, versions of one model, lost aliases."""
    client, experiment = registry.connection
    problems, versions = [], registry.versions(name)
    if queue := Journal(registry, name).queue():
        problems.append(f"{len(queue)} entries are open")
    running = client.search_runs(
        [experiment], f"attributes.status = 'RUNNING' and tags.`{NAME_TAG}` = '{name}'"
    )
    if running:
        problems.append(f"{len(running)} runs are running")
    logged = client.search_logged_models([experiment], filter_string=f"tags.`{NAME_TAG}` = '{name}'")
    if len(logged) != len(versions):
        problems.append(f"{len(logged)} models were logged for {len(versions)} versions")
    folders = [folder for version in versions if (folder := registry.folder_of(version))]
    if folders and len(list(folders[0].parents[1].iterdir())) != len(versions):
        problems.append("there are files of a model that is not logged")
    identities = [(version.digest, version.default_passes) for version in versions]
    if len(set(identities)) < len(identities):
        problems.append("one model is two versions")
    if not {CHAMPION, CANDIDATE} <= registry.aliases(name).keys():
        problems.append("an alias is missing")
    return problems
