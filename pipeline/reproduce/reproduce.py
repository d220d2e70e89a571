"""Making a registered version again: a fresh work tree, its environment, its inputs, its stages, and their
digests.

The user's project is only read. Stages have runs and a tracking store of their own, and their code is the
version's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import STOPPED, Busy, StorageError
from pipeline.launch import machine, scratch
from pipeline.launch.fingerprint import digest_path
from pipeline.launch.history import MADE_FROM
from pipeline.processes import signal_on_parent_death
from pipeline.registry import champions
from pipeline.registry.package import Registry
from pipeline.reproduce.comparison import Outcome, Output, Report, causes, differing_parts
from pipeline.reproduce.plan import Plan, Request, make_plan
from pipeline.reproduce.workplace import READY, Workplace, workplace

DONE = "seconds.json"  # of stages that have finished, in a reproduction that was stopped

Say = Callable[[str], None]


def reproduce(root: Path, uri: str, request: Request, say: Say) -> Plan | Report:
    """Make the version at `uri` again and compare; for a dry run, the plan.

    Raises as `make_plan` does; Busy where the environment cannot be made; StorageError where a stage fails."""
    registry = Registry(root)
    version = champions.resolve(registry, uri)
    key = artifacts.digest([str(root.resolve()), version.uri, version.digest, *vars(request).values()])
    with workplace(root, key[:12]) as place:
        plan = make_plan(root, registry, version, request, place)
        if request.dry_run:
            return plan
        for line in plan.head():
            say(line)
        for source in plan.sources:
            source.lay()
        plan.environment.make(say)
        (place.folder / READY).touch()
        return _run_all(plan, root, place, say)


def _run_all(plan: Plan, root: Path, place: Workplace, say: Say) -> Report:
    """Run the stages, up to the first that differs."""
    inputs = {source.path: source.where for source in plan.sources}
    report = Report(plan.recipe.uri, plan.recipe.digest, plan.recipe.commit, plan.environment.words, inputs)
    done = _read_done(place)
    for stage in plan.stages:
        if stage not in done:
            say(f"running {stage}")
            done[stage] = _run(plan, stage)
            artifacts.write_atomic(place.folder / DONE, json.dumps(done))
        report.outcomes.append(_compare(plan, root, stage, done[stage]))
        if report.outcomes[-1].differs:
            break
    return report


def _read_done(place: Workplace) -> dict[str, float]:
    try:
        return {
            str(stage): float(seconds)
            for stage, seconds in json.loads((place.folder / DONE).read_text()).items()
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _run(plan: Plan, stage: str) -> float:
    """Run a stage to its end; seconds of it. It is stopped with us, and writes a checkpoint then."""
    python, began = plan.environment.python, time.monotonic()
    own = {"PYTHONPATH": str(plan.tree), "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if not plan.environment.new and os.environ.get("PYTHONPATH"):
        own["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    environment = scratch.environment(plan.tree, plan.profile) | own
    command = scratch.command(stage, python)
    process = subprocess.Popen(
        command,
        cwd=plan.tree,
        env=environment,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=partial(signal_on_parent_death, signal.SIGTERM),
    )
    try:
        status = process.wait()
    except BaseException:
        with contextlib.ExitStack() as last:
            last.callback(process.kill)  # a second signal
            process.send_signal(signal.SIGTERM)
            process.wait()
        raise
    problem = f"ends with status {status} in the work tree {plan.tree}; what it said is above"
    if status == STOPPED:
        raise Busy("E-BUSY-161", stage, problem, "run the same command again, which goes on there")
    if status:
        fix = "mend that and run it again, which goes on there; `crescendo clean` removes it after a day"
        raise StorageError("E-IO-161", stage, problem, fix)
    return time.monotonic() - began


def _compare(plan: Plan, root: Path, stage: str, seconds: float) -> Outcome:
    recipe = plan.recipe
    outputs = []
    for path in plan.graph.compared(stage):
        output = Output(path, recipe.digest_of(path), digest_path(plan.tree / path))
        outputs.append(Output(path, output.expected, output.found, _parts(plan, root, output)))
    outcome = Outcome(stage, seconds, recipe.seconds.get(stage), tuple(outputs))
    if not outcome.differs:
        return outcome
    run_dir = _run_dir(plan.tree, stage)
    now = {**plan.environment.facts(), **(machine.recorded(run_dir) if run_dir else {})}
    found = causes(
        recipe.facts.get(stage, {}),
        now,
        machine.pins(plan.environment.lock),
        _other_inputs(plan, stage, run_dir),
        plan.changed.get(stage, []),
    )
    return Outcome(stage, seconds, outcome.seconds_then, outcome.outputs, found)


def _parts(plan: Plan, root: Path, output: Output) -> tuple[str, ...]:
    """Which files differ, where the former content is in the version or the project."""
    if not output.differs:
        return ()
    for place in (plan.recipe.snapshot, root / output.path):
        with contextlib.suppress(StorageError):
            if artifacts.directory_digest(place) == output.expected:
                return differing_parts(plan.tree / output.path, place)
    return ()


def _run_dir(tree: Path, stage: str) -> Path | None:
    found = sorted(tree.glob(f"runs/{stage}/*/{MADE_FROM}"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def _other_inputs(plan: Plan, stage: str, run_dir: Path | None) -> list[str]:
    """Inputs of a stage that are not those of the version: as they were found, and as the run says that it read
    them."""
    other = {source.path for source in plan.sources if not source.same}
    if run_dir is not None:
        read = json.loads((run_dir / MADE_FROM).read_text(encoding="utf-8"))["deps"]
        other |= {path for path, digest in read.items() if plan.recipe.digest_of(path) not in (None, digest)}
    return sorted(other & set(plan.graph.inputs[stage]))
