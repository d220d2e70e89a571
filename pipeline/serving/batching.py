"""Work that waits, and the thread that does it: images of unlike prompts and seeds in one batch.

A batch does not show in its images: `Generator.images` fills each up to one size, so that an image is that of its
own prompt and seed, bit for bit, whatever the company. What differs within a batch of the network (model, steps,
size) makes batches of its own. An upscaled image takes long; between its rows of tiles, images that wait are made.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.inference.generator import BATCH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.inference.upscaling import UpscaleSettings
    from pipeline.serving.model import Served
    from pipeline.serving.sizes import Size

# What a batch that is not full waits for more, over the time that the last one took, and in seconds: whoever got an
# image from that asks for the next now.
LINGER, MAX_LINGER = 0.1, 0.1


class QueueFull(Exception):
    """More work than may wait."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One image to make; its future gives uint8 [3,H,W] on the CPU."""

    model: Served
    prompt: str
    seed: int
    future: Future[Tensor] = field(default_factory=Future)
    abandoned: bool = False

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.abandoned = True
        self.future.cancel()


@dataclass(eq=False, kw_only=True)
class ImageJob(Job):
    """An image from a prompt. `size` None: the model's squares."""

    steps: int | None = None
    size: Size | None = None

    @property
    def key(self) -> tuple[int, int | None, Size | None]:
        """Jobs of one key may share a batch."""
        return id(self.model), self.steps, self.size


@dataclass(eq=False, kw_only=True)
class UpscaleJob(Job):
    """An image uint8 [H,W,3] to enlarge."""

    image: NDArray[np.uint8]
    settings: UpscaleSettings


class Batcher:
    """At most `capacity` jobs that wait, and one thread that does them, oldest first.

    on_batch(images, seconds) is told of every batch.
    """

    def __init__(self, capacity: int, on_batch: Callable[[int, float], None]) -> None:
        self._capacity = capacity
        self._on_batch = on_batch
        self._waiting: deque[ImageJob | UpscaleJob] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._linger = 0.0
        self._rows = 1  # of a batch of the model that was used last
        self.seconds_per_image = 0.1  # lately

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return sum(not job.abandoned for job in list(self._waiting))

    @property
    def retry_after(self) -> int:
        """Seconds until what waits now is likely done, at least 1."""
        return max(1, round(self.waiting * self.seconds_per_image))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the batch that it is at; what waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for job in self._waiting:
            job.abandon()

    def submit(self, jobs: Sequence[ImageJob | UpscaleJob]) -> None:
        """Let all these jobs wait. Raises QueueFull, and takes none, if they are too many."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.abandoned)
            if len(self._waiting) + len(jobs) > self._capacity:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    # --- In the thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._changed.wait_for(lambda: len(self._waiting) >= self._rows or self._closed, self._linger)
                if self._closed:
                    return
                job = self._waiting.popleft() if self._waiting else None
            if isinstance(job, UpscaleJob):
                self._upscale(job)
            elif job is not None:
                self._generate(job)

    def _generate(self, first: ImageJob) -> None:
        """Make the image of a job, in a batch with others of its key."""
        self._rows = BATCH[next(first.model.generator.snapshot.denoiser.parameters()).device.type]
        with self._changed:
            images = [job for job in self._waiting if isinstance(job, ImageJob)]
            others = [job for job in images if job.key == first.key][: self._rows - 1]
            self._waiting = deque(job for job in self._waiting if job not in others)
        batch = [job for job in (first, *others) if job.future.set_running_or_notify_cancel()]
        if batch:
            start = time.monotonic()
            _settle(batch, _images)
            self._record(len(batch), time.monotonic() - start)

    def _upscale(self, job: UpscaleJob) -> None:
        """Enlarge an image, and make others between its rows of tiles."""
        if not job.future.set_running_or_notify_cancel():
            return

        def on_progress(done: int, total: int) -> None:
            if job.abandoned or self._closed:
                raise CancelledError
            with self._changed:
                first = next((each for each in self._waiting if isinstance(each, ImageJob)), None)
                if first is not None:
                    self._waiting.remove(first)
            if first is not None:
                self._generate(first)

        start = time.monotonic()
        _settle([job], lambda jobs: [_upscaled(job, on_progress)])
        self._record(1, time.monotonic() - start)

    def _record(self, images: int, seconds: float) -> None:
        self._linger = min(LINGER * seconds, MAX_LINGER)
        self.seconds_per_image += 0.1 * (seconds / images - self.seconds_per_image)
        self._on_batch(images, seconds)


def _settle(jobs: Sequence[Any], make: Callable[[Sequence[Any]], Sequence[Tensor]]) -> None:
    """Give each job its result; where a batch fails, each job is tried alone."""
    try:
        results = make(jobs)
    except Exception as error:  # It is raised where the job is waited for.
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
            return
        for job in jobs:
            _settle([job], make)
        return
    for job, result in zip(jobs, results, strict=True):
        job.future.set_result(result)


def _images(jobs: Sequence[ImageJob]) -> Sequence[Tensor]:
    """The images of jobs of one key."""
    first = jobs[0]
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    return list(first.model.generator.images(prompts, seeds, first.steps, size=first.size))


def _upscaled(job: UpscaleJob, on_progress: Callable[[int, int], None]) -> Tensor:
    import torch

    pixels = job.model.generator.upscale(job.image, job.prompt, job.seed, job.settings, on_progress)
    return torch.from_numpy(pixels).permute(2, 0, 1)
