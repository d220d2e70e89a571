"""`crescendo sync`: what the tracking server has missed."""

from __future__ import annotations

import argparse

from pipeline.errors import Busy, StorageError
from pipeline.project import find_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `sync`."""
    sync = commands.add_parser(
        "sync",
        help="send to MLflow what was logged while its server was away",
        description="Sends what waits in the run folders, and ends runs whose process died. Stages do that "
        "when they start; this is for after the last one.",
    )
    sync.set_defaults(run=_sync)


def _sync(args: argparse.Namespace) -> int:
    from pipeline.compute import load_profile
    from pipeline.launch.stage import runs_folder
    from pipeline.tracking.store import server_name
    from pipeline.tracking.sync import send_waiting

    root = find_root()
    lost = []
    for sync in send_waiting(root, runs_folder(root, load_profile(root))):
        if not sync.complete:
            problem = f"MLflow does not answer; {sync.waiting} still wait in {sync.folder}"
            raise Busy("E-BUSY-041", server_name(root), problem, "start it, and run this again")
        print(f"{sync.folder}: {sync.waiting} sent")
        lost += [sync.folder] * bool(sync.lost)
    if lost:
        problem = "what is named above can never be sent, since its files are gone or MLflow refused it"
        fix = "log those files by hand if they matter; all else was sent"
        raise StorageError("E-IO-045", ", ".join(map(str, lost)), problem, fix)
    print("nothing waits for MLflow")
    return 0
