"""The journal of a registered model, in words."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pipeline.registry import champions
from pipeline.registry.journal import DONE, Entry, Journal
from pipeline.registry.package import CHAMPION, Registry


def describe(root: Path, name: str) -> list[str]:
    """A line for each entry, the oldest first, and one for each alias that is not where the journal has it."""
    registry = Registry(root)
    entries = Journal(registry, name).entries()
    lines = [describe_entry(entry) for entry in entries]
    for alias, number in sorted(registry.aliases(name).items()):
        if champions.expected(entries, alias) is None:
            lines.append(
                f"{alias} points to version {number}, which is older than this journal, or set outside"
            )
    return [*lines, *strays(registry, name, entries)] or [f"{name}: nothing was promoted yet"]


def describe_entry(entry: Entry) -> str:
    """As in `2026-11-30 07:20:11 UTC  promote  me@host  registered version 2, champion 1 -> 2`."""
    did = [f"registered version {entry.registered['version']}"] if entry.registered else []
    did += [f"{move.alias} {move.before or 'none'} -> {move.after}" for move in entry.moves]
    if entry.state != DONE:
        did.append("not ended")
    return f"{when(entry.created)}  {entry.action}  {entry.who}  {', '.join(did)}"


def when(milliseconds: int) -> str:
    """A time since 1970 in words."""
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def strays(registry: Registry, name: str, entries: list[Entry]) -> list[str]:
    """A line for each alias that somebody moved without the journal, or removed."""
    aliases = registry.aliases(name)
    lines = []
    for alias in sorted({*aliases, CHAMPION}):
        expected, number = champions.expected(entries, alias), aliases.get(alias)
        gone = champions.find_gone(registry, name, alias)
        if gone is not None:
            lines.append(str(champions.gone_error(name, alias, gone)))
        elif expected is not None and number != expected:
            outside = f"which was set outside of the journal; it has version {expected}"
            lines.append(f"{alias} points to version {number}, {outside}")
    return lines
