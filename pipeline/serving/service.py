"""A running service: the model, the work that waits, and waiting for it on behalf of a client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.serving.answers import CLIENT_GONE, Refused
from pipeline.serving.batching import Batcher, ImageJob, QueueFull, UpscaleJob
from pipeline.serving.follow import Follower
from pipeline.serving.limits import Images, ImageStore, Limits, RateLimiter
from pipeline.serving.metrics import Metrics
from pipeline.serving.schemas import Readiness
from pipeline.serving.uploads import Uploads

if TYPE_CHECKING:
    from starlette.requests import Request
    from torch import Tensor

    from pipeline.registry.package import Registry
    from pipeline.serving.model import Served


class Service:
    """What the routes share. `start` before the first request, `close` after the last."""

    def __init__(self, model: Served, limits: Limits) -> None:
        self.limits = limits
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.batcher = Batcher(limits.queue, self.metrics.on_batch)
        self.metrics.on_model(model)
        self.images: Images = ImageStore()
        self.uploads = Uploads()
        self.follower: Follower | None = None
        self._model = model
        self._rates = RateLimiter(limits.rate)

    def follow(self, registry: Registry, address: str, device: str, seconds: float) -> None:
        """Serve what an alias points to, from now on."""
        self.follower = Follower(registry, address, self._model, device, seconds, self.metrics)

    @property
    def model(self) -> Served:
        """What is served now."""
        return self._model if self.follower is None else self.follower.model

    def start(self) -> None:
        """Start the threads."""
        self.batcher.start()
        if self.follower is not None:
            self.follower.start()

    def close(self) -> None:
        """End the threads and the process of uploads."""
        if self.follower is not None:
            self.follower.close()
        self.batcher.close()
        self.uploads.close()

    def admit(self, request: Request, images: int) -> None:
        """Count `images` against the rate of a client. Raises Refused."""
        client = "" if request.client is None else request.client.host
        seconds = self._rates.wait_for(client, images)
        if seconds:
            message = f"at most {self.limits.rate:g} images a minute"
            raise Refused(429, "rate_limit_exceeded", message, seconds)

    def readiness(self) -> Readiness:
        """What is served, and what is not."""
        model, follower = self.model, self.follower
        answer = Readiness(model=model.name, version=model.number, digest=model.digest)
        if follower is not None and follower.refused is not None:
            refused = follower.refused
            answer.refused = {"version": refused.version.number, "reason": refused.reason}
        if follower is not None and follower.unreachable is not None:
            answer.registry = follower.unreachable
        return answer

    async def run(self, request: Request, jobs: Sequence[ImageJob | UpscaleJob]) -> list[Tensor]:
        """The images of jobs, uint8 [3,H,W] each. Raises Refused where they cannot wait, take too long, or the
        client has gone; they are not made then, unless their batch has begun."""
        try:
            self.batcher.submit(jobs)
        except QueueFull:
            message = f"{self.batcher.waiting} images wait, and {self.limits.queue} may"
            raise Refused(429, "queue_full", message, self.batcher.retry_after) from None
        work = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        work.add_done_callback(_retrieve)
        gone = asyncio.ensure_future(_until_gone(request))
        either: list[asyncio.Future[Any]] = [work, gone]
        try:
            await asyncio.wait(either, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise Refused(CLIENT_GONE, "client_gone", "the client has gone")
            message = f"not done within {self.limits.timeout:g} s"
            raise Refused(503, "timeout", message, self.batcher.retry_after)
        finally:
            gone.cancel()
            work.cancel()
            for job in jobs:
                job.abandon()


def _retrieve(work: asyncio.Future[Any]) -> None:
    """Look at how work ended that nobody waits for any more; asyncio would log it as an error."""
    if not work.cancelled():
        work.exception()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
