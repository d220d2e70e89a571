"""`python -m benchmarks.chaos`: campaigns of faults in batches, a seed each; what is done is not done again.

    python -m benchmarks.chaos                          # `make chaos`: what is not done yet of the batches below
    python -m benchmarks.chaos race --batches 5         # the next five seeds, from 0, that are not in the results
    python -m benchmarks.chaos race --seeds 7 --server http://127.0.0.1:5000
    python -m benchmarks.chaos --table                  # the results as Markdown

race      10 batches of 5 rounds with 16 promoters; a checker beside them
crash     5 batches of 20 promotions and rollbacks that die at a step, and `fsck`
tamper    a batch of 100 changes of registered files, and six users of each
request   a batch of some hundred bad requests
kill-...  5 batches of 20 kills of pretrain, finetune or refine, compared bit by bit with a run that was left alone
ray-...   a batch of 20 kills of each of them under Ray: of the stage, a worker, or a daemon of Ray's
node      2 batches of a node that a cluster loses while pretrain is a job on it, and that comes back

Those of the registry run on SQLite and on PostgreSQL, but `request`, whose stores are part of the requests.

A batch adds a line to runs/chaos/results.jsonl. Status 1 where a promise was broken: the lines say with which seed,
and its folder stays in runs/chaos. PostgreSQL is Debian's, in a cluster that this starts; where that is missing,
the campaigns on it are left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.chaos import forks, results, stores
from benchmarks.chaos.crashes import crash
from benchmarks.chaos.kills import kill, kill_under_ray
from benchmarks.chaos.nodes import lose_a_node
from benchmarks.chaos.races import race
from benchmarks.chaos.requests import request
from benchmarks.chaos.results import Batch, Findings
from benchmarks.chaos.stores import Store
from benchmarks.chaos.tampering import tamper
from pipeline import artifacts
from pipeline.drill.plan import STAGES
from pipeline.errors import InputMissing, run_main
from pipeline.project import find_root
from pipeline.tracking.runs import git_commit

FOLDER = "runs/chaos"
Campaign = Callable[[int, Path, Store], Findings]
OF_STAGES: dict[str, Campaign] = {
    **{f"kill-{stage}": partial(kill, stage) for stage in STAGES},
    **{f"ray-{stage}": partial(kill_under_ray, stage) for stage in STAGES},
    "node": lose_a_node,
}
CAMPAIGNS: dict[str, Campaign] = {
    "race": race,
    "crash": crash,
    "tamper": tamper,
    "request": request,
    **OF_STAGES,
}
# That make a campaign complete; 5 of others.
BATCHES = {"race": 10, "tamper": 1, "request": 1, "node": 2, **{f"ray-{stage}": 1 for stage in STAGES}}
ON_SQLITE_ALONE = ("request", *OF_STAGES)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)} (all)")
    parser.add_argument("--batches", type=int, help="of each campaign on each store (what makes it complete)")
    parser.add_argument("--seeds", type=int, nargs="+", help="these, done or not")
    parser.add_argument("--store", choices=(stores.SQLITE, stores.POSTGRES), help="only on this one")
    parser.add_argument("--server", help="the URI of an MLflow server, which keeps what is registered")
    parser.add_argument("--table", action="store_true", help="print the results, and run nothing")
    args = parser.parse_args(arguments)
    unknown = set(args.campaigns) - set(CAMPAIGNS)
    if unknown:
        parser.error(f"no campaign {', '.join(sorted(unknown))}: choose from {', '.join(CAMPAIGNS)}")
    folder = find_root() / FOLDER
    if args.table:
        print(results.table(results.read(folder / "results.jsonl")))
        return 0
    for left in folder.glob("process-*"):  # by one that was killed
        if not artifacts.is_alive(int(left.name.removeprefix("process-"))):
            shutil.rmtree(left)
    own = folder / f"process-{os.getpid()}"  # others may run beside this one
    try:
        template = stores.rehearse(own)
        kinds = (args.store,) if args.store else (stores.SQLITE, stores.POSTGRES)
        failures = sum(run_on(kind, args, folder, template) for kind in kinds)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return 1 if failures else 0


def run_on(kind: str, args: argparse.Namespace, folder: Path, template: Path) -> int:
    """Run the batches that were asked for on one kind of store; how many promises were broken."""
    failures = 0
    chosen = [
        each for each in args.campaigns or CAMPAIGNS if kind == stores.SQLITE or each not in ON_SQLITE_ALONE
    ]
    try:
        with opened(kind, args.server, template.parent / "server") as registry:
            for campaign in chosen:
                shown = registry.kind if registry else kind
                with artifacts.lease(folder / f"{campaign}-{kind}.lease"):
                    for seed in args.seeds or fresh(folder, campaign, shown, args.batches):
                        failures += run_batch(campaign, seed, registry or template, folder)
    except InputMissing as error:
        print(f"left out of {', '.join(chosen)} on {kind}: {error}", file=sys.stderr)
    return failures


def fresh(folder: Path, campaign: str, store: str, count: int | None) -> list[int]:
    """The next `count` seeds from 0 that are not in the results; None: those that make the campaign complete."""
    batches = results.read(folder / "results.jsonl")
    done = {batch.seed for batch in batches if (batch.campaign, batch.store) == (campaign, store)}
    if count is None:
        return [seed for seed in range(BATCHES.get(campaign, 5)) if seed not in done]
    return [seed for seed in range(len(done) + count) if seed not in done][:count]


@contextlib.contextmanager
def opened(kind: str, server: str | None, place: Path) -> Iterator[Store | None]:
    """The server for campaigns on PostgreSQL; None for SQLite, of which every batch has a new one."""
    if kind == stores.SQLITE:
        yield None
    elif server:
        yield stores.reached(server)
    else:
        with stores.own_server(place) as own:
            yield own


def run_batch(campaign: str, seed: int, registry: Store | Path, folder: Path) -> int:
    """Run one batch on a store, or a new one from a template, and note it; how many promises were broken."""
    kind = stores.SQLITE if isinstance(registry, Path) else registry.kind.partition(" ")[0]
    place = folder / f"{campaign}-{kind}-{seed}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if isinstance(registry, Path):
        registry = stores.new_sqlite(place / "store", registry)
    started, used = time.monotonic(), _cpu()
    try:
        found = CAMPAIGNS[campaign](seed, place, registry)
    except forks.Failed as error:
        found = Findings(failures=[f"seed {seed} ended early: {error}"])
    batch = Batch(
        campaign=campaign,
        store=registry.kind,
        seed=seed,
        counts=dict(found.counts),
        failures=found.failures,
        seconds=round(time.monotonic() - started, 1),
        cpu=round(_cpu() - used, 1),
        commit=str(git_commit(find_root()))[:12],
    )
    results.append(folder / "results.jsonl", batch)
    shown = ", ".join(f"{count} {name}" for name, count in batch.counts.items())
    print(
        f"{campaign}, {registry.kind}, seed {seed}: {shown}; {batch.seconds:.0f} s, {batch.cpu:.0f} s of CPU",
        flush=True,
    )
    for line in found.failures:
        print(f"  BROKEN {line}", flush=True)
    if not found.failures:
        shutil.rmtree(place)
    return len(found.failures)


def _cpu() -> float:
    """Seconds of this process and of those it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


if __name__ == "__main__":
    run_main(main)
