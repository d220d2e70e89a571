"""`crescendo clean`: planning what to remove, removing it, and telling of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.compute import ComputeProfile
from pipeline.housekeeping.caches import unneeded_caches
from pipeline.housekeeping.items import Item, in_words, remove
from pipeline.housekeeping.leftovers import leftovers, ray_sessions, reproductions
from pipeline.housekeeping.needs import Needs
from pipeline.housekeeping.runs import unneeded_runs
from pipeline.launch.stage import runs_folder

SHOWN = 5  # paths of a kind


@dataclass(frozen=True)
class Plan:
    """items: what may be removed. stay: runs that may not, counted by reason."""

    items: list[Item] = field(default_factory=list)
    stay: Counter[str] = field(default_factory=Counter)


def plan(root: Path, profile: ComputeProfile, needs: Needs, keep: int) -> Plan:
    """What may be removed of the project at `root`, of its runs, wherever they lie, and on this machine.

    keep: how many of a stage's runs, and of a kind of cache, stay although nothing needs them."""
    runs = runs_folder(root, profile).resolve()
    storage = Path(profile.storage).resolve() if profile.storage else None
    made = Plan()
    made.items.extend(unneeded_runs(runs, needs, keep, made.stay))
    made.items.extend(unneeded_caches(root, runs, storage, needs, keep))
    made.items.extend(leftovers(root, runs, storage is not None))
    made.items.extend(ray_sessions())
    made.items.extend(reproductions(root))
    whole = {item.path for item in made.items}
    return Plan([item for item in made.items if not whole & set(item.path.parents)], made.stay)


def carry_out(made: Plan) -> Plan:
    """Remove the items; what was removed. Those that a stage has begun to use meanwhile stay."""
    done = Plan([], Counter(made.stay))
    for item in made.items:
        if remove(item):
            done.items.append(item)
        elif os.path.lexists(item.path):
            done.stay["in use"] += 1
    return done


def told(made: Plan, root: Path, freed: bool) -> Iterator[str]:
    """Lines: what was, or would be, freed, by kind; and the runs that stay, by reason."""
    kinds: dict[str, list[Item]] = {}
    for item in made.items:
        kinds.setdefault(item.kind, []).append(item)
    for kind, items in kinds.items():
        yield f"{kind}: {len(items)}, {in_words(sum(item.size for item in items))}"
        yield from (f"  {_short(item.path, root)}" for item in items[:SHOWN])
        if len(items) > SHOWN:
            yield f"  and {len(items) - SHOWN} more"
    if made.stay:
        yield "runs that stay: " + ", ".join(
            f"{count} {reason}" for reason, count in made.stay.items() if count
        )
    total = in_words(sum(item.size for item in made.items))
    yield f"{'freed' if freed else 'would free'} {total} in all"


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
