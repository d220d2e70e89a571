"""`crescendo drill`: whether a killed run loses anything on this machine."""

from __future__ import annotations

import argparse
import os
import sys

from pipeline.project import find_root

STAGES = ("pretrain", "finetune", "refine")
PROFILES = {"ray": "local", "process": "process"}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `drill`."""
    drill = commands.add_parser(
        "drill",
        help="kill a stage at random moments, and compare with one that was left alone",
        description="Trains a few batches of a stage with your parameters and data, twice in a scratch project "
        "below runs/drill: left alone, and killed at random (SIGKILL). Prints a receipt, which is also in "
        "runs/drill/STAGE/receipt.json. Exit status 0: bits are equal, and nothing is lost or left behind.",
    )
    drill.add_argument("stage", nargs="?", choices=STAGES, default="pretrain", help="(pretrain)")
    drill.add_argument("--kills", type=int, default=20, help="how many (20)")
    drill.add_argument("--minutes", type=float, default=5.0, help="after which it kills no more (5)")
    drill.add_argument(
        "--under", choices=sorted(PROFILES), help="profile local or process (default: your own)"
    )
    drill.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    drill.add_argument(
        "--attach", metavar="MODEL", help="keep the receipt as a tag of a registered version: models:/NAME/3"
    )
    drill.set_defaults(run=_drill)


def _drill(args: argparse.Namespace) -> int:
    from pipeline.compute import DEFAULT, PROFILE_VARIABLE
    from pipeline.drill.drill import FOLDER, drill
    from pipeline.registry import champions
    from pipeline.registry.package import Registry
    from pipeline.tracking.runs import git_commit

    own = os.environ.get(PROFILE_VARIABLE) or DEFAULT
    profile = PROFILES[args.under] if args.under else own
    root = find_root()
    registry = Registry(root) if args.attach else None
    version = registry and champions.resolve(registry, args.attach)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    receipt = drill(root, args.stage, args.kills, args.minutes, profile, args.seed, say)
    for line in receipt.lines():
        print(line)
    print(f"written to {FOLDER}/{args.stage}/receipt.json")
    if registry and version:
        registry.set_tags(version, receipt.tag(git_commit(root)))
        print(f"attached to {version.uri}")
    return 0 if receipt.passed else 1
