"""Running a stage to its end, left alone or killed on its way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.drill.plan import CHECKPOINT, Kill
from pipeline.drill.scratch import Scratch, title_of
from pipeline.errors import STOPPED, Busy
from pipeline.launch.scratch import command
from pipeline.training.records import read_records

POLL = 0.02  # s
GRACE = 15.0  # s, for processes that end with a killed one
GRACE_UNDER_RAY = 75.0  # two agents of a killed Ray's wait a minute for its GCS server
STOPS = 10  # of these in a row, after which it is not
TRIES = 3  # starts for a kill, before which the stage may have ended
# Of a private Ray, what is in the first word of a process's title: those that train, and daemons.
TITLES = {"worker": "TrainWorker", "raylet": "raylet/raylet", "gcs": "gcs/gcs_server"}
Say = Callable[[str], None]


@dataclass
class Timing:
    """Of a run that is left alone, in seconds: all of it, up to its first record, and between two records.

    records: the image numbers of its records."""

    total: float
    start: float
    batch: float
    records: list[int]


@dataclass
class Blow:
    """A kill that took place: at which image (the newest record of the process; 0: none), of what, and when (wall
    clock). recovery: seconds until the next batch was done; None where the stage had ended or was killed before."""

    image: int
    victim: str
    time: float
    recovery: float | None = None


@dataclass
class Attempt:
    """The stage in a scratch project, started as often as it takes."""

    scratch: Scratch
    under_ray: bool
    process: subprocess.Popen[bytes] | None = None
    begun: float = 0.0  # wall clock of the last start or kill
    blows: list[Blow] = field(default_factory=list)
    stops: int = 0
    finished: bool = False  # once: from then on the stage only exports its result

    def start(self) -> None:
        """Start the stage, unless it runs. Raises Busy where it has failed."""
        if self.process is not None and self.process.poll() is None:
            return
        self.require_a_known_ending()
        self.finished |= self.process is not None and self.process.poll() == 0
        with open(self.scratch.log, "ab") as log:
            self.process = subprocess.Popen(
                command(self.scratch.stage),
                cwd=self.scratch.folder,
                env=self.scratch.environment,
                stdout=log,
                stderr=log,
            )
        self.begun = time.time()

    def require_a_known_ending(self) -> None:
        """Raise Busy where the stage has ended as neither finished, killed nor stopped."""
        status = None if self.process is None else self.process.poll()
        self.stops = self.stops + 1 if status == STOPPED else 0
        if status in (None, 0, -signal.SIGKILL) or 0 < self.stops < STOPS:
            return
        last = self.scratch.log.read_text(errors="replace").splitlines()[-1:] or ["without a word"]
        problem = f"ends with status {status} in the drill ({last[0]})"
        raise Busy(
            "E-BUSY-150", self.scratch.stage, problem, f"mend that first; all of it is in {self.scratch.log}"
        )

    def records(self, since: float | None = None) -> list[dict[str, Any]]:
        """Records of progress since a moment (wall clock), by default the last start or kill."""
        moment = self.begun if since is None else since
        folder = self.scratch.run_dir()
        known = read_records(folder / "progress.jsonl") if folder else []
        return [record for record in known if record["time"] >= moment]

    def image(self) -> int:
        """Image of the newest of these; 0: there is none."""
        records = self.records()
        return int(records[-1]["nimg"]) if records else 0

    def alive(self) -> bool:
        """Whether the stage runs."""
        return self.process is not None and self.process.poll() is None

    def wait_until(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment, or the stage's end."""
        while self.alive() and not moment():
            time.sleep(POLL)

    def wait_for(self, kill: Kill, timing: Timing) -> None:
        """Wait until a kill is due, or the stage has ended."""
        at_start = kill.image == 0 or self.finished
        if not at_start:
            self.wait_until(lambda: self.image() >= kill.image)
        later = (blow.recovery for blow in self.blows if blow.recovery)
        start = min([timing.start, *later])  # the first one also makes a store
        wait = kill.wait * (start if at_start else CHECKPOINT * timing.batch)
        due = (self.begun if at_start else time.time()) + wait
        self.wait_until(lambda: time.time() >= due)

    def strike(self, kill: Kill) -> Blow:
        """Kill the stage; under Ray at even odds that, one of the processes that train, or one of Ray's daemons."""
        assert self.process is not None
        self.note_recovery()
        victims = [("stage", [self.process.pid])]
        if self.under_ray:
            titles = {pid: title_of(pid).partition(" ")[0] for pid in self.scratch.processes()}
            found = {name: [pid for pid in titles if part in titles[pid]] for name, part in TITLES.items()}
            victims += [(name, pids) for name, pids in found.items() if pids]
        place = kill.chance * len(victims)
        name, pids = victims[int(place)]
        pid = pids[int(place % 1 * len(pids))]
        image = self.image()
        with contextlib.suppress(ProcessLookupError):  # one that has ended meanwhile
            os.kill(pid, signal.SIGKILL)
        if pid == self.process.pid:
            self.process.wait()
        self.begun = time.time()
        self.blows.append(Blow(image, name, self.begun))
        return self.blows[-1]

    def note_recovery(self) -> None:
        """Note how long the last kill kept the stage from its next batch."""
        for blow in self.blows[-1:]:
            if after := self.records(since=blow.time):
                blow.recovery = after[0]["time"] - blow.time

    def finish(self) -> float:
        """Run the stage to its end; seconds of it. Raises Busy where it fails."""
        started = time.monotonic()
        while self.process is None or self.process.poll() != 0:
            self.start()
            assert self.process is not None
            self.process.wait()
        self.note_recovery()
        return time.monotonic() - started

    def end(self) -> None:
        """Kill what is left of the stage."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def remaining(self) -> list[str]:
        """Processes that outlive the stage by GRACE, or GRACE_UNDER_RAY; they are killed."""
        patience = time.monotonic() + (GRACE_UNDER_RAY if self.under_ray else GRACE)
        while (left := self.scratch.processes()) and time.monotonic() < patience:
            time.sleep(0.1)
        titles = [title_of(pid) or str(pid) for pid in left]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return titles


def timed(attempt: Attempt) -> Timing:
    """Run a stage that is left alone."""
    attempt.start()
    begun = attempt.begun
    total = attempt.finish()
    records = attempt.records()
    images = sorted({int(record["nimg"]) for record in records} - {0})
    first, last = records[0]["time"], records[-1]["time"]
    return Timing(total, first - begun, (last - first) / max(len(images) - 1, 1), images)


def killed(attempt: Attempt, plan: Sequence[Kill], timing: Timing, seconds: float, say: Say) -> float:
    """Run a stage that is killed as planned, for some seconds, and then left alone; seconds of all of it."""
    started = time.monotonic()
    for number, kill in enumerate(plan, 1):
        if time.monotonic() - started > seconds:
            break
        for _ in range(TRIES):
            attempt.start()
            attempt.wait_for(kill, timing)
            if attempt.alive():
                blow = attempt.strike(kill)
                say(
                    f"kill {number} of {len(plan)}: {blow.victim}, at image {blow.image} of {timing.records[-1]}"
                )
                break
    attempt.finish()
    return time.monotonic() - started
