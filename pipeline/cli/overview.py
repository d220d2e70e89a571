"""`crescendo status`, `crescendo plan` and `crescendo doctor`."""

from __future__ import annotations

import argparse
import json
import sys
import time

from pipeline.project import find_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `status`, `plan` and `doctor`."""
    status = commands.add_parser(
        "status",
        help="what is fresh, what runs, what is registered, what the disk holds",
        description="Says whether `dvc repro` would run each stage, and why; how far a run is, or with which "
        "line it failed; which versions are registered; and what takes room on the disk.",
    )
    status.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=2.0,
        metavar="SECONDS",
        help="show it again every so many seconds (2), until Ctrl-C",
    )
    status.add_argument("--json", action="store_true", help="print it as JSON")
    status.set_defaults(run=_status)
    plan = commands.add_parser(
        "plan",
        help="what `dvc repro` would run, and the float operations, memory and time that it would take",
        description="Counts parameters and float operations of all stages, rehearses those that `dvc repro` would "
        "run, or those that are named, for some dozen updates each in a folder of their own, and says what the "
        "whole of each will take here.",
    )
    plan.add_argument("stages", nargs="*", metavar="STAGE", help="stages to plan (those that would run)")
    plan.set_defaults(run=_plan)
    doctor = commands.add_parser(
        "doctor",
        help="what is wrong with machine, packages, files, storage or servers, and its cure",
        description="Looks at the machine, the packages, params.yaml, DVC, git, run folders, MLflow and Ray, and "
        "changes nothing. Ends with status 78 if something needs a cure.",
    )
    doctor.set_defaults(run=_doctor)


def _status(args: argparse.Namespace) -> int:
    from pipeline.errors import Busy, ConfigError
    from pipeline.overview.project import as_json, lines, look

    if args.watch is not None and not 0.1 <= args.watch <= 86400:
        problem = f"{args.watch:g} is out of range"
        raise ConfigError("E-CFG-081", "--watch", problem, "choose 0.1 to 86400 seconds")
    root, clear = find_root(), "\033[2J\033[H" if sys.stdout.isatty() and not args.json else ""
    while True:
        try:
            overview = look(root)
            text = json.dumps(as_json(overview)) if args.json else "\n".join(lines(overview))
        except Busy as busy:
            if args.watch is None:
                raise
            text = str(busy)
        print(clear + text, flush=True)
        if args.watch is None:
            return 0
        time.sleep(args.watch)


def _plan(args: argparse.Namespace) -> int:
    from pipeline.compute import load_profile
    from pipeline.overview.plan import lines, make_plan

    root = find_root()
    plan = make_plan(root, args.stages, lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(lines(plan.rows, load_profile(root))), flush=True)
    if plan.failure is not None:
        raise plan.failure
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from pipeline.errors import ConfigError
    from pipeline.overview.doctor import examine

    ill = 0
    for finding in examine(find_root()):
        ill += bool(finding.fix)
        cure = f". Fix: {finding.fix}" if finding.fix else ""
        print(f"{'!!' if finding.fix else 'ok'}  {finding.subject:9} {finding.text}{cure}", flush=True)
    if ill:
        print(f"{ill} finding{'s' * (ill > 1)} to mend", flush=True)
    return ConfigError.exit_status if ill else 0
