"""`crescendo reproduce`: make a registered version again, and compare bits."""

from __future__ import annotations

import argparse
import json
import sys

from pipeline.project import find_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `reproduce`."""
    reproduce = commands.add_parser(
        "reproduce",
        help="make a registered model again, and say whether bits are equal",
        description="Runs the stages that made a version again: its commit with its changes, in a work tree "
        "outside of the project; its environment; its data. Compares what they make by digest, and names the "
        "first stage that differs and by what. Exit status 0: identical; 1: differs. It runs the version's "
        "code: use registries that you trust.",
    )
    reproduce.add_argument("model", metavar="MODEL", help="models:/NAME/3 or models:/NAME@champion")
    reproduce.add_argument("--only", metavar="STAGE", help="this stage alone, with the inputs that it had")
    reproduce.add_argument("--dry-run", action="store_true", help="what it would take; no stage runs")
    reproduce.add_argument(
        "--environment",
        choices=("lock", "here"),
        default="lock",
        help="packages: those of the version's requirements.lock, in a new environment unless they are installed "
        "(lock); or those installed here",
    )
    reproduce.add_argument(
        "--data",
        choices=("lock", "here"),
        default="lock",
        help="raw data: those of the version, by digest (lock); or what the project has now",
    )
    reproduce.add_argument("--json", action="store_true", help="print it for programs")
    reproduce.set_defaults(run=_reproduce)


def _reproduce(args: argparse.Namespace) -> int:
    from pipeline.reproduce.comparison import Report
    from pipeline.reproduce.plan import Request
    from pipeline.reproduce.reproduce import reproduce

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    request = Request(args.only, args.environment == "here", args.data == "here", args.dry_run)
    found = reproduce(find_root(), args.model, request, say)
    print(json.dumps(found.to_json(), indent=1, sort_keys=True) if args.json else "\n".join(found.lines()))
    return 1 if isinstance(found, Report) and not found.identical else 0
