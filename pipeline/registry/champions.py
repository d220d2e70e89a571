"""Which version is the champion, which were before it, and what is said where it is gone.

MLflow removes an alias with the version that it points to, and says nothing. The journal still knows it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import GateFailed, InputMissing
from pipeline.registry.journal import DONE, Entry, Journal
from pipeline.registry.package import CHAMPION, REGISTRY_URI, Registry, Version

ROLLBACK = "rollback"  # the action of an entry


def former(entries: list[Entry], alias: str = CHAMPION) -> list[str]:
    """Versions that `alias` pointed to, the last one first, as a rollback takes them: it takes one off, and a
    promotion puts one on."""
    stack: list[str] = []
    for entry in entries:
        for move in entry.moves if entry.state == DONE else ():
            if move.alias != alias:
                continue
            if move.before is not None and move.before not in stack[-1:]:
                stack = [number for number in stack if number != move.before] + [move.before]
            if entry.action == ROLLBACK and move.after in stack:
                del stack[stack.index(move.after) :]
            stack = [number for number in stack if number != move.after] + [move.after]
    return stack[::-1]


def ever(entries: list[Entry], alias: str = CHAMPION) -> set[str]:
    """Versions that `alias` has pointed to, rolled back since or not."""
    done = (move for entry in entries if entry.state == DONE for move in entry.moves if move.alias == alias)
    return {number for move in done for number in (move.before, move.after) if number is not None}


def expected(entries: list[Entry], alias: str) -> str | None:
    """The version that `alias` points to by the journal; None where it was never moved."""
    moves = [move for entry in entries if entry.state == DONE for move in entry.moves if move.alias == alias]
    return moves[-1].after if moves else None


@dataclass(frozen=True)
class Gone:
    """An alias that is gone with its version, or without it. back: the version to return to; None if none is
    left."""

    problem: str
    back: str | None


def find_gone(registry: Registry, name: str, alias: str) -> Gone | None:
    """What became of an alias that is missing; None if it is there, or never was."""
    if alias in registry.aliases(name):
        return None
    entries = Journal(registry, name).entries()
    number = expected(entries, alias)
    if number is None:
        return None
    existing = {version.number for version in registry.versions(name)}
    if number in existing:
        return Gone(f"the alias was removed; it pointed to version {number}", number)
    back = next((each for each in former(entries, alias) if each in existing), None)
    return Gone(f"version {number}, to which it pointed, was deleted", back)


def gone_error(name: str, alias: str, gone: Gone) -> InputMissing:
    """The line about it, with the command that mends it."""
    if gone.back is None or alias != CHAMPION:
        fix = f"promote another version: `crescendo promote --to {alias}`"
    else:
        fix = f"run `crescendo rollback --to {gone.back}`"
    return InputMissing("E-INP-071", f"models:/{name}@{alias}", gone.problem, fix)


def resolve(registry: Registry, uri: str) -> Version:
    """As `Registry.resolve`. Raises InputMissing also where an alias is gone with its version, and says so."""
    match = REGISTRY_URI.fullmatch(uri)
    if match and match["alias"] and "'" not in uri:
        gone = find_gone(registry, match["name"], match["alias"])
        if gone is not None:
            raise gone_error(match["name"], match["alias"], gone)
    return registry.resolve(uri)


def rollback(root: Path, name: str, to: str | None = None, log: Callable[[str], None] = print) -> str:
    """Make the former champion, or the version `to`, the champion, once its files are verified; its number.

    Raises:
        InputMissing: there is no such version, or no former champion.
        GateFailed: that version was never the champion.
        StorageError: its files are missing or damaged.
        Busy: somebody else moved the alias meanwhile.
    """
    registry = Registry(root)
    journal = Journal(registry, name)
    with journal.turn(ROLLBACK, log) as turn:
        before = registry.aliases(name).get(CHAMPION)
        champions = former(journal.entries())
        existing = {version.number for version in registry.versions(name)}
        target = to or next((each for each in champions if each != before and each in existing), None)
        if target is None:
            problem = f"no version was the champion before {f'version {before}' if before else 'now'}"
            fix = "name one: `crescendo rollback --to VERSION`"
            raise InputMissing("E-INP-072", f"models:/{name}@{CHAMPION}", problem, fix)
        version = registry.version(name, target)
        if target not in ever(journal.entries()):
            problem, fix = "it was never the champion", f"promote it: `crescendo promote {version.uri}`"
            raise GateFailed("E-GATE-003", version.uri, problem, fix)
        with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
            registry.verify(version, Path(folder))
        if target == before:
            log(f"version {target} already is the champion")
            return target
        turn.move(CHAMPION, before, version)
    log(f"version {target} is the champion" + (f", in place of {before}" if before else ""))
    return target
