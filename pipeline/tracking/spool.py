"""The spool of a run: its entries in a file, until the tracking server has them.

Entries are appended to `tracking.jsonl` of the run folder and flushed to disk before they are sent. `tracking.json`
holds, for each server, the id of the run there and up to which byte of the spool it has everything. So neither a
server that is away nor a killed process loses or doubles anything.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifacts
from pipeline.tracking.entries import Entry, Point
from pipeline.tracking.store import warn

SPOOL = "tracking.jsonl"
STATE = "tracking.json"


class Waiting(NamedTuple):
    """An entry that a server does not have, and where the next one begins in the spool."""

    entry: Entry
    end: int


class Spool:
    """Entries of one run, and those that wait for one server. To be used by one process at a time."""

    def __init__(self, folder: Path, server: str) -> None:
        self.path, self._state_path, self._server = folder / SPOOL, folder / STATE, server
        self._state = _read_state(self._state_path)
        self._points: set[tuple[str, int, float]] = set()
        self._pictures: set[tuple[str, str, str, int]] = set()
        self._full = False
        self.waiting: deque[Waiting] = deque()
        self.begin: Entry | None = None  # the newest that the server has
        self.ended = True  # whether the newest begin has its end
        self._size = self._load()

    @property
    def run_id(self) -> str | None:
        """Id of the run at the server, if it is known."""
        run: str | None = self._state.get(self._server, {}).get("run")
        return run

    @property
    def held(self) -> bool:
        """Whether any server has all entries."""
        return any(state["sent"] >= self._size for state in self._state.values())

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries, without points and pictures that are there already. Where the disk is full they are kept in
        memory."""
        fresh = [entry for entry in map(self._fresh, entries) if entry]
        lines = [json.dumps(entry).encode() + b"\n" for entry in fresh]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._full:
                warn(f"{self.path}: cannot be written ({error.strerror}); what waits would be lost by a kill")
            self._full = True
        for entry, line in zip(fresh, lines, strict=True):
            self._size += len(line)
            self._add(entry, self._size)

    def opened(self, run_id: str) -> None:
        """Note the run at the server; another one than before gets everything."""
        if self.run_id not in (None, run_id):
            self._state[self._server]["sent"] = 0
            self._load()
        self._state.setdefault(self._server, {"sent": 0})["run"] = run_id

    def sent(self) -> None:
        """Note that the server has the first waiting entry."""
        entry, end = self.waiting.popleft()
        if entry["kind"] == "begin":
            self.begin = entry
        self._state.setdefault(self._server, {})["sent"] = end
        if not self._full:
            artifacts.write_atomic(self._state_path, json.dumps(self._state, indent=1))

    def _load(self) -> int:
        """Read the file; its size, without an incomplete last line, which is cut off."""
        self.waiting.clear()
        if not self.path.is_file():
            return 0
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        known, end, damaged = self._state.get(self._server, {}).get("sent", 0), 0, 0
        for line in content[:whole].splitlines(keepends=True):
            end += len(line)
            entry = _parse(line)
            if entry is None:
                damaged += 1
                continue
            self._fresh(entry)
            if end > known:
                self._add(entry, end)
            elif entry["kind"] == "begin":
                self.begin = entry
            self.ended = entry["kind"] == "end"
        if damaged:
            warn(f"{self.path}: {damaged} damaged lines are left out")
        return whole

    def _add(self, entry: Entry, end: int) -> None:
        self.waiting.append(Waiting(entry, end))
        self.ended = entry["kind"] == "end"

    def _fresh(self, entry: Entry) -> Entry | None:
        """The entry, without points that were seen before; None if nothing is left, or it is a picture that was."""
        if entry["kind"] == "image":
            picture = (entry["path"], entry["digest"], entry["name"], entry["step"])
            if picture in self._pictures:
                return None
            self._pictures.add(picture)
        if entry["kind"] != "points":
            return entry
        fresh: list[list[Any]] = []
        for point in (Point(*row) for row in entry["points"]):
            value = (point.key, point.step, point.value)
            if value not in self._points:
                self._points.add(value)
                fresh.append(list(point))
        return {**entry, "points": fresh} if fresh else None


def _parse(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("kind"), str) else None


def _read_state(path: Path) -> dict[str, Any]:
    """What servers have; nothing where the file is missing or damaged, so that all is sent again."""
    try:
        state = json.loads(path.read_bytes())
        return {
            server: {"run": str(each["run"]), "sent": int(each["sent"])} for server, each in state.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
