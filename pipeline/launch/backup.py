"""Copies of a run's state in an object store, sent while it trains, from which it goes on on another machine.

Below URL/STAGE/FINGERPRINT lie `objects/SHA256`, the files, and `states/NUMBER`, each of which names the files of
one state at their paths in the run folder; it is written last. A thread of the driver sends every new checkpoint
with all else that the run needs. Training never waits for it, and goes on while the store is away. The newest KEEP
states stay, and older ones until all files of these are in the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline import artifacts
from pipeline.data.folders import patiently
from pipeline.data.store import open_store
from pipeline.errors import InputMissing, PipelineError, Stopped, StorageError, one_line

KEEP = 2
POLL_SECONDS = 2.0
MOMENT = "nimg-????????????"
SCRATCH = "backup-"  # folders of this module in the run folder
WHOLE = ("result", "averages*/" + MOMENT)  # folders of a run, or of a round of growth, that never change
RECORDS = ("progress.jsonl", "watch/scores.jsonl")


class File(NamedTuple):
    """What a state knows of a file."""

    sha256: str
    size: int


State = dict[str, File]  # by the path in the run folder


def folders_of(run_dir: Path) -> list[Path]:
    """The folders that a run goes on from: the newest checkpoint of each round, stored averages, and results."""
    found = []
    for part in (run_dir, *run_dir.glob("to-*/")):
        found += sorted(part.glob(f"checkpoints/{MOMENT}"))[-1:]
        found += [path for pattern in WHOLE for path in sorted(part.glob(pattern))]
    return found


def collect(run_dir: Path, scratch: Path) -> State:
    """The state of a run as it is now, with its files in `scratch`, linked where that is possible: the run removes
    old checkpoints at any time. Raises FileNotFoundError where it has just done so."""
    state = {}
    for folder in folders_of(run_dir):
        known = artifacts.read_manifest(folder)["files"]
        for name in (*known, artifacts.MANIFEST):
            copy = scratch / folder.relative_to(run_dir) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, copy)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(folder / name, copy)
            digest = known[name]["sha256"] if name in known else artifacts.sha256_file(copy)
            state[str(copy.relative_to(scratch))] = File(digest, copy.stat().st_size)
    for name in RECORDS:
        if (run_dir / name).exists():
            copy = scratch / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run_dir / name, copy)
            state[name] = File(artifacts.sha256_file(copy), copy.stat().st_size)
    return state


def move_state(scratch: Path, run_dir: Path) -> None:
    """Move what `collect` has collected to a run folder: last what shows that a run has begun."""
    records = [path for name in RECORDS if (path := scratch / name).exists()]
    folders = sorted(folders_of(scratch), key=lambda path: not path.parent.name.startswith("averages"))
    for path in records + folders:
        place = run_dir / path.relative_to(scratch)
        place.parent.mkdir(parents=True, exist_ok=True)
        artifacts.remove(place)
        os.rename(path, place)


class Backup:
    """The copies of one run, below `url`. As a context manager, sends new states for the block."""

    def __init__(self, stage: str, run_dir: Path, url: str) -> None:
        """Raises InputMissing where there is no such store."""
        self.stage, self.run_dir = stage, run_dir
        self.where = f"{url.rstrip('/')}/{stage}/{run_dir.name}"
        self._store, self._place = open_store(self.where)
        self._newest: list[Path] = []  # what the last state that was sent was made of
        self._silent = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="backup", daemon=True)

    def __enter__(self) -> Backup:
        for left in self.run_dir.glob(f"{SCRATCH}*"):
            shutil.rmtree(left)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None or issubclass(kind, Stopped):
            self.send_new()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.send_new()

    def send_new(self) -> None:
        """Send the state, if it is another one than was sent before. One line says that it cannot be sent."""
        folders = folders_of(self.run_dir)
        if folders in ([], self._newest):
            return
        try:
            with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.run_dir) as scratch:
                self._send(collect(self.run_dir, Path(scratch)), Path(scratch))
            self._newest, self._silent = folders, False
        except FileNotFoundError:  # a checkpoint has given way meanwhile: the next one is there
            pass
        except (PipelineError, OSError) as error:
            if not self._silent:
                self._say(f"its state is not copied to {self.where} for now ({one_line(error)})")
            self._silent = True

    def restore(self) -> bool:
        """Fetch the newest state that is whole to the run folder, which has none; whether there is one."""
        for number in sorted(self._states(), reverse=True):
            try:
                with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.run_dir) as scratch:
                    self._fetch(self._read(number), Path(scratch))
                    move_state(Path(scratch), self.run_dir)
            except StorageError as error:
                self._say(f"{error.where}: {error.problem}; the state before is used")
                continue
            self._say(f"goes on from its state in {self.where}")
            return True
        return False

    def _fetch(self, state: State, scratch: Path) -> None:
        for name, file in state.items():
            target, where = scratch / name, f"{self.where}/objects/{file.sha256}"
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise _damaged(f"{self.where}/states")
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._present(where):
                patiently(
                    partial(self._store.get_file, f"{self._place}/objects/{file.sha256}", str(target)), where
                )
            if artifacts.sha256_file(target) != file.sha256:
                raise _damaged(where)

    @contextlib.contextmanager
    def _present(self, where: str) -> Iterator[None]:
        try:
            yield
        except InputMissing:
            raise StorageError("E-IO-181", where, "is missing", "use an older state") from None

    def _send(self, state: State, scratch: Path) -> None:
        there = self._sizes("objects")
        for name, file in state.items():
            if there.get(file.sha256) != file.size:
                put = partial(
                    self._store.put_file, str(scratch / name), f"{self._place}/objects/{file.sha256}"
                )
                patiently(put, f"{self.where}/objects/{file.sha256}", "cannot be sent")
        number, target = max(self._states(), default=0) + 1, f"{self.where}/states"
        body = json.dumps(state).encode()
        path = f"{self._place}/states/{number:08d}"
        patiently(lambda: self._store.pipe_file(path, body), target, "cannot be sent")
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove states that newer ones make superfluous, and files of none."""
        numbers = sorted(self._states())
        kept = {number: self._read(number) for number in numbers[-KEEP:]}
        there = self._sizes("objects")
        files = {file for state in kept.values() for file in state.values()}
        if all(there.get(file.sha256) == file.size for file in files):
            old = [f"{self._place}/states/{number:08d}" for number in numbers[:-KEEP]]
            unused = there.keys() - {file.sha256 for file in files}
            for path in [*old, *(f"{self._place}/objects/{name}" for name in unused)]:
                self._store.rm_file(path)

    def _read(self, number: int) -> State:
        path, where = f"{self._place}/states/{number:08d}", f"{self.where}/states/{number:08d}"
        content = patiently(lambda: self._store.cat_file(path), where)
        try:
            return {
                str(name): File(str(sha256), int(size))
                for name, (sha256, size) in json.loads(content).items()
            }
        except (ValueError, TypeError, AttributeError):
            raise _damaged(where) from None

    def _states(self) -> list[int]:
        return [int(name) for name in self._sizes("states") if name.isdigit()]

    def _sizes(self, kind: str) -> dict[str, int]:
        place = f"{self._place}/{kind}"

        def find() -> Any:
            self._store.invalidate_cache()
            return self._store.find(place, detail=True)

        found = patiently(find, f"{self.where}/{kind}", "cannot be listed")
        return {path.rpartition("/")[2]: int(about["size"]) for path, about in found.items()}

    def _say(self, text: str) -> None:
        print(one_line(f"{self.stage}: {text}"), file=sys.stderr, flush=True)


def _damaged(where: str) -> StorageError:
    return StorageError("E-IO-180", where, "is not what was sent", "use an older state")
