"""The journal of a registered model: who moved which alias when, and the lock by which promotions take turns.

MLflow has neither a lock nor a compare-and-set, on any of its stores. It has version numbers: the database's key is
(name, version), a new version is the highest one plus 1, and a deleted one keeps its number. So numbers are never
given twice, and once a version can be seen, no lower one will appear. The journal of NAME is therefore a registered
model, NAME.journal, whose versions are its entries; they have tags and no files.

- A new entry is `open`. The open entry with the lowest number holds the lock, and the others form a queue: they are
  equally safe on a SQLite file, and on a server with PostgreSQL, from several checkouts and machines.
- What the holder is about to do is written into its entry first. At the end the entry is settled: it keeps the
  moves that took place and becomes `done`; one that changed nothing is deleted.
- A holder that dies leaves its entry open. Its owner raises `beat` every BEAT seconds, and the next in the queue,
  nobody else, watches it by its own clock: an entry whose beat stands still for LEASE seconds, or whose process
  is gone from this machine, is settled by what it did. An alias is moved by one request, so a move took place or
  did not.
- A holder that only stopped (a suspended machine) finds its entry settled when it looks, which it does before each
  move, and gives up. A request lasts at most two timeouts of 10 seconds, less than LEASE.

What remains: a process that stops between that look and its request, for longer than LEASE, is still obeyed by
MLflow, as is anybody who sets an alias without this journal. `history`, `verify` and `fsck` tell that an alias is
elsewhere.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pipeline import artifacts
from pipeline.errors import Busy, PipelineError, StorageError, one_line
from pipeline.registry.package import IDENTITY, Registry, Version

SUFFIX = ".journal"
BEAT, LEASE = 5.0, 30.0  # seconds
POLL = 0.5  # seconds, for the next in the queue; those behind it ask less often
ATTEMPTS = 6  # to create an entry; MLflow gives up after 3 where many do
STATE, OWNER, BEATS = "crescendo.state", "crescendo.owner", "crescendo.beat"
ACTION, WHO, PROCESS = "crescendo.action", "crescendo.who", "crescendo.process"
MOVES, REGISTERED = "crescendo.moves", "crescendo.registered"
OPEN, DONE = "open", "done"


@dataclass(frozen=True)
class Move:
    """An alias and the versions that it pointed to before and after; None for no version."""

    alias: str
    before: str | None
    after: str


MANY_MOVES, STRINGS = TypeAdapter(tuple[Move, ...]), TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class Entry:
    """One entry. registered: number and tags of the version that it registered. created: ms since 1970, by the
    clock of the store. process: see `this_process`."""

    number: int
    state: str
    owner: str
    beat: str
    action: str
    who: str
    process: str
    moves: tuple[Move, ...]
    registered: Mapping[str, str]
    created: int

    @classmethod
    def of(cls, version: Version) -> Entry:
        """An entry from its tags. Raises StorageError where somebody else has written them."""
        tags = version.tags
        try:
            moves = MANY_MOVES.validate_json(tags.get(MOVES, "[]"), strict=True)
            registered = STRINGS.validate_json(tags.get(REGISTERED, "{}"), strict=True)
            if registered and not registered.get("version"):
                raise ValueError
        except ValueError:
            fix = f"delete version {version.number} of {version.name} in MLflow"
            raise StorageError("E-IO-048", version.uri, "is no entry of a journal", fix) from None
        return cls(
            number=int(version.number),
            state=tags.get(STATE, ""),
            owner=tags.get(OWNER, ""),
            beat=tags.get(BEATS, ""),
            action=one_line(tags.get(ACTION, "")),
            who=one_line(tags.get(WHO, "")),
            process=one_line(tags.get(PROCESS, "")),
            moves=moves,
            registered=registered,
            created=version.created,
        )


class Turn:
    """The lock, held: what may be changed under it. Every method raises Busy if it was lost."""

    def __init__(self, journal: Journal, entry: Entry) -> None:
        self._journal, self._entry = journal, entry
        self._moves: list[Move] = []

    def check(self) -> None:
        """Raise Busy unless the lock is still held."""
        queue = self._journal.queue()
        if not queue or queue[0].number != self._entry.number:
            raise _lost(self._journal.model)

    def note_registered(self, version: Version) -> None:
        """Keep what was registered, also where no alias moves."""
        kept = {key: value for key in IDENTITY if (value := version.tags.get(key))}
        self._journal.write(self._entry.number, REGISTERED, {"version": version.number, **kept})

    def move(self, alias: str, before: str | None, version: Version) -> None:
        """Point `alias`, which points to `before`, to `version`, and read it back."""
        registry, name = self._journal.registry, self._journal.name
        self._moves.append(Move(alias, before, version.number))
        self._journal.write(self._entry.number, MOVES, [asdict(move) for move in self._moves])
        self.check()
        number = registry.aliases(name).get(alias)
        if number != before:
            problem = f"points to {_version(number)}, and to {_version(before)} when it was read"
            fix = "somebody moved it outside of crescendo: see `crescendo history`, then run it again"
            raise Busy("E-BUSY-042", f"models:/{name}@{alias}", problem, fix)
        registry.set_alias(version, alias)


class Journal:
    """The journal of the registered model `name`."""

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name = registry, name
        self.model = name + SUFFIX

    def entries(self) -> list[Entry]:
        """All entries, oldest first; none where the model has no journal."""
        return [Entry.of(version) for version in self.registry.versions(self.model)]

    def queue(self) -> list[Entry]:
        """The open entries, the holder of the lock first."""
        return [Entry.of(version) for version in self.registry.versions(self.model, (STATE, OPEN))]

    def write(self, number: int, tag: str, value: object) -> None:
        """Set a tag of an entry to a string, or to the JSON of something else."""
        text = value if isinstance(value, str) else artifacts.canonical_json(value)
        self.registry.set_tags(Version(self.model, str(number)), {tag: text})

    @contextlib.contextmanager
    def turn(self, action: str, log: Callable[[str], None]) -> Iterator[Turn]:
        """Wait for the lock, hold it for the block, and settle its entry.

        Raises Busy if another process took this one for dead, StorageError if the registry fails."""
        entry = self._enqueue(action)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(entry.number, ended), daemon=True)
        beating.start()
        try:
            self._wait(entry, log)
            yield Turn(self, entry)
        except BaseException:
            with contextlib.suppress(PipelineError):
                self.settle(entry.number)
            raise
        else:
            self.settle(entry.number)
        finally:
            ended.set()
            beating.join()

    def settle(self, number: int) -> str:
        """End an open entry by what it did, and say so; "" if it did nothing, and is gone."""
        entry = next((each for each in self.queue() if each.number == number), None)
        if entry is None:
            return ""
        aliases = self.registry.aliases(self.name)
        moves = [move for move in entry.moves if aliases.get(move.alias) == move.after]
        if not moves and not entry.registered:
            self.registry.delete(Version(self.model, str(number)))
            return ""
        self.write(number, MOVES, [asdict(move) for move in moves])
        self.write(number, STATE, DONE)
        said = [f"registered version {entry.registered['version']}"] if entry.registered else []
        return ", ".join([*said, *(f"moved {move.alias} to version {move.after}" for move in moves)])

    def _enqueue(self, action: str) -> Entry:
        """A new open entry of this process. MLflow repeats a request whose answer was lost, which may make two: the
        first counts."""
        owner = secrets.token_hex(8)
        tags = {
            STATE: OPEN,
            OWNER: owner,
            BEATS: "0",
            ACTION: action,
            WHO: f"{_user()}@{socket.gethostname()}",
            PROCESS: this_process(),
        }
        self.registry.create_model(
            self.model, f"What `crescendo` did to {self.name}: see `crescendo history`"
        )
        for attempt in range(ATTEMPTS):
            failure: StorageError | None = None
            try:
                self.registry.create_entry(self.model, tags)
            except StorageError as error:
                failure = error
            mine = [entry for entry in self.queue() if entry.owner == owner]
            if mine:
                for extra in mine[1:]:
                    self.registry.delete(Version(self.model, str(extra.number)))
                return mine[0]
            if failure is None:
                raise _lost(self.model)
            time.sleep(random.uniform(0, 0.2 * 2**attempt))
        assert failure is not None
        raise failure

    def _beat(self, number: int, ended: threading.Event) -> None:
        for beat in range(1, 2**31):
            if ended.wait(BEAT):
                return
            with contextlib.suppress(
                StorageError
            ):  # a server that is away; the lock is looked at before moves
                self.write(number, BEATS, str(beat))

    def _wait(self, entry: Entry, log: Callable[[str], None]) -> None:
        """Until `entry` is the first. Settles the one right before it if its owner is dead."""
        seen, since, said = "", time.monotonic(), False
        while True:
            queue = self.queue()
            place = next((i for i, each in enumerate(queue) if each.number == entry.number), None)
            if place is None:
                raise _lost(self.model)
            if place == 0:
                return
            ahead = queue[place - 1]
            if f"{ahead.number}/{ahead.beat}" != seen:
                seen, since = f"{ahead.number}/{ahead.beat}", time.monotonic()
            if is_gone(ahead.process) or time.monotonic() - since > LEASE:
                did = self.settle(ahead.number) or "changed nothing"
                log(f"{ahead.action} by {ahead.who} ({ahead.process}) did not end: it {did}")
                continue
            if not said:
                log(f"waiting for {queue[0].action} by {queue[0].who} ({queue[0].process})")
                said = True
            time.sleep(POLL * place)


def changed_tag(version: Version, entries: Sequence[Entry]) -> str | None:
    """Which tag that identifies a version is not that of its registration, in words; None if none is, or no entry
    tells."""
    known = next(
        (each.registered for each in entries if each.registered.get("version") == version.number), {}
    )
    tag = next((tag for tag in IDENTITY if known and known.get(tag, "") != version.tags.get(tag, "")), None)
    return tag and f"the tag {tag} is not that of its registration, {str(known.get(tag))[:12]}"


def this_process() -> str:
    """`MACHINE/PID`; the machine, where process ids mean the same, is a digest of its boot and its PID
    namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        machine = artifacts.digest([boot, os.readlink("/proc/self/ns/pid")])[:12]
    except OSError:  # not Linux: no process is known to be gone
        machine = secrets.token_hex(6)
    return f"{machine}/{os.getpid()}"


def is_gone(process: str) -> bool:
    """Whether a process ran on this machine and runs no more."""
    machine, _, pid = process.partition("/")
    if machine != this_process().partition("/")[0] or not re.fullmatch("[0-9]{1,9}", pid):
        return False
    return not artifacts.is_alive(int(pid))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user's name
        return str(os.getuid())


def _lost(model: str) -> Busy:
    problem = "another process took this one for dead, and has its turn"
    return Busy("E-BUSY-043", model, problem, "see `crescendo history`, then run it again")


def _version(number: str | None) -> str:
    return "no version" if number is None else f"version {number}"
