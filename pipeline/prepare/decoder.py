"""Processes that decode untrusted files: one may crash, hang or need too much memory, and only its item is lost.

Items are sent in chunks. If a process dies, the items of its chunk are sent again one at a time. Each item has
its own limit of processor time, so that a busy machine changes no result; waiting counts only against a far
longer limit of wall time. Linux only, like these limits.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Generic, Self, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from pipeline.errors import BadData
from pipeline.prepare import photos
from pipeline.prepare.images import check_bytes
from pipeline.prepare.limits import USUAL, Limits
from pipeline.processes import end_with_creator, signal_on_parent_death

T = TypeVar("T")
Task = tuple[bytes, str]  # the bytes of a file, and its name for messages
Chunk = list[Task | BadData]
Work = Callable[[bytes, str], Any]
Finish = Callable[[list[Any]], list[T]]
CHUNK = 16  # items sent together
CHUNK_BYTES = 8 * 2**20  # limit of their sum, unless one item alone has more
PATIENCE = 4  # item limits of wall time that a chunk may spend waiting
OPEN_FILES = 64
KILLED = "E-IMG-013"
LOSSES = {"E-IMG-008", "E-IMG-009", "E-IMG-010", KILLED}  # which the machine may have caused, not the bytes
# Imported once, by the fork server.
PRELOAD = [
    "numpy",
    "PIL.Image",
    "kornia_rs",
    "torch",
    "torchvision.io",
    "pipeline.prepare.ingest",
]


class Decoder(Generic[T]):
    """Runs `work` on untrusted bytes in processes that may die. A context manager; leaving it ends them.

    Args:
        work: what to do with (bytes, name); may raise BadData.
        processes: how many decode at once.
        limits: of the bytes and pixels of an item.
        seconds: processor time an item may take; by default what `limits` calls for.
        megabytes: memory an item may take, beyond that of a fresh process; by default what `limits` calls for.
        finish: applied there to the list of results of a chunk, for work that is cheaper in batches.

    `work` and `finish` must pickle.
    """

    def __init__(
        self,
        work: Work,
        processes: int,
        limits: Limits = USUAL,
        seconds: float | None = None,
        megabytes: int | None = None,
        finish: Finish[T] = list,
    ) -> None:
        self._work = work
        self._finish = finish
        self._processes = processes
        self._limits = limits
        self._seconds = seconds or limits.seconds
        self._megabytes = megabytes or limits.megabytes
        self._pool = self._new_pool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def map(self, tasks: Iterable[Task | BadData]) -> Iterator[T | BadData]:
        """The result of each task, in order. A task that fails gives its BadData; one that is BadData stays so.

        Tasks are read as decoders get free, two chunks per process ahead. BadData is E-IMG-001 empty or 002 too
        many bytes, both checked before sending; one of `LOSSES`: 008 the decoder died, 009 took too long, 010 needs
        too much memory, 013 the decoder was killed from outside; or what `work` raises. Other exceptions of `work`
        are bugs, and are raised here.
        """
        sent: deque[tuple[Chunk, ProcessFuture[list[T | BadData]]]] = deque()
        try:
            for chunk in _chunks(tasks, self._limits):
                sent.append((chunk, self._send(_sound(chunk))))
                if len(sent) > 2 * self._processes:
                    yield from self._answers(*sent[0])
                    sent.popleft()
            while sent:
                yield from self._answers(*sent[0])
                sent.popleft()
        finally:
            for _, future in sent:
                future.cancel()  # type: ignore[no-untyped-call]

    def _answers(self, chunk: Chunk, future: ProcessFuture[list[T | BadData]]) -> Iterator[T | BadData]:
        results = iter(self._receive(_sound(chunk), future))
        return (each if isinstance(each, BadData) else next(results) for each in chunk)

    def _new_pool(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, *photos.PLUGINS.values()])  # passes over what is not there
        start = ((self._work, self._finish), self._megabytes, self._limits.max_pixels)
        return ProcessPool(self._processes, initializer=_confine, initargs=start, context=context)

    def _send(self, chunk: Sequence[Task]) -> ProcessFuture[list[T | BadData]]:
        if not self._pool.active:  # A decoder died between two chunks, and pebble then gives up.
            self.__exit__()
            self._pool = self._new_pool()
        timeout = self._seconds * (len(chunk) + PATIENCE)
        task = (self._work, self._finish, chunk, self._seconds, self._megabytes)
        return self._pool.schedule(_run, task, timeout=timeout)

    def _receive(self, chunk: Sequence[Task], future: ProcessFuture[list[T | BadData]]) -> list[T | BadData]:
        try:
            return future.result()
        except (ProcessExpired, TimeoutError, BrokenProcessPool) as exc:
            if len(chunk) > 1:
                return [self._receive([task], self._send([task]))[0] for task in chunk]
            if isinstance(exc, BrokenProcessPool):
                raise  # Alone, no task can be to blame: decoders do not start.
            return [self._loss(chunk[0][1], exc)]

    def _loss(self, where: str, exc: ProcessExpired | TimeoutError) -> BadData:
        remedy = "export it again, or remove it"
        if isinstance(exc, TimeoutError) or exc.exitcode == -signal.SIGPROF:
            problem = f"took longer than {self._seconds:g} s to decode"
            return BadData("E-IMG-009", where, problem, f"scale it down, {remedy}, or raise data.max_pixels")
        if exc.exitcode == -signal.SIGKILL:
            problem = "lost its decoder, which was killed from outside"
            return BadData(KILLED, where, problem, "free some memory, and run it again")
        return BadData("E-IMG-008", where, f"crashed its decoder: {_cause(exc.exitcode)}", remedy)


def _chunks(tasks: Iterable[Task | BadData], limits: Limits) -> Iterator[Chunk]:
    """Consecutive tasks: at most CHUNK, and at most CHUNK_BYTES unless a task alone has more. Tasks that fail
    `check_bytes` become their BadData."""
    chunk: Chunk = []
    size = 0
    for task in map(partial(_checked, limits), tasks):
        more = 0 if isinstance(task, BadData) else len(task[0])
        if chunk and (len(chunk) == CHUNK or size + more > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(task)
        size += more
    if chunk:
        yield chunk


def _checked(limits: Limits, task: Task | BadData) -> Task | BadData:
    if not isinstance(task, BadData):
        try:
            check_bytes(*task, limits)
        except BadData as exc:
            return exc
    return task


def _sound(chunk: Chunk) -> list[Task]:
    return [task for task in chunk if not isinstance(task, BadData)]


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


# --- In the decoder's process.


def _confine(work: object, megabytes: int, max_pixels: int) -> None:
    """Give this process its limits. `work` comes along to have its modules imported before."""
    import torch
    from PIL import Image

    for module in PRELOAD:  # What is imported later would count against the items.
        importlib.import_module(module)
    for kind in photos.PLUGINS:
        photos.plugin(kind)
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)  # of which Pillow allows the double
    signal_on_parent_death(signal.SIGKILL)
    end_with_creator()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's own handlers wait for C code to return.
    quiet = os.open(os.devnull, os.O_WRONLY)  # Image libraries print what they find.
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.close(quiet)
    limits = {
        resource.RLIMIT_AS: _address_space() + megabytes * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[0]) * resource.getpagesize()


def _run(
    work: Work, finish: Finish[T], chunk: Sequence[Task], seconds: float, megabytes: int
) -> list[T | BadData]:
    attempts = [_attempt(work, content, where, seconds, megabytes) for content, where in chunk]
    finished = iter(finish([each for each in attempts if not isinstance(each, BadData)]))
    return [each if isinstance(each, BadData) else next(finished) for each in attempts]


def _attempt(work: Work, content: bytes, where: str, seconds: float, megabytes: int) -> Any:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, even within C code.
    try:
        return work(content, where)
    except BadData as exc:
        # Without the frames it came from, which would hold the image until the chunk is done.
        return BadData(*exc.args)
    except MemoryError:
        problem = f"needs more than {megabytes} MB to decode"
        return BadData(
            "E-IMG-010", where, problem, "scale it down, export it as JPEG, or raise data.max_pixels"
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
