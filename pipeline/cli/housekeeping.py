"""`crescendo clean`: free the disk of what nothing needs any more."""

from __future__ import annotations

import argparse

from pipeline.errors import ConfigError
from pipeline.project import find_root

KEEP = 2


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `clean`."""
    clean = commands.add_parser(
        "clean",
        help="remove finished runs, caches and leftovers that nothing needs",
        description="Removes finished runs and caches that the current parameters, dvc.lock and registered models "
        "do not need, but for the newest ones, and what killed processes left. Unfinished runs, and what a running "
        "stage uses, stay. Tells what it freed.",
    )
    clean.add_argument(
        "--keep", type=int, default=KEEP, help=f"of each stage and cache, how many others stay ({KEEP})"
    )
    clean.add_argument("--dry-run", action="store_true", help="tell the same, and remove nothing")
    clean.set_defaults(run=_clean)


def _clean(args: argparse.Namespace) -> int:
    from pipeline.compute import load_profile
    from pipeline.housekeeping.clean import carry_out, plan, told
    from pipeline.housekeeping.needs import find_needs

    if args.keep < 0:
        raise ConfigError("E-CFG-085", "--keep", f"{args.keep} is negative", "choose 0 or more")
    root = find_root()
    made = plan(root, load_profile(root), find_needs(root), args.keep)
    for line in told(made if args.dry_run else carry_out(made), root, not args.dry_run):
        print(line)
    return 0
