"""How much a client may ask for, and how long what it asked for is kept."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

MAX_IMAGES = 10  # of one request, as OpenAI's
MAX_STEPS = 100
MAX_PROMPT = 4000  # characters
MAX_JSON_BYTES = 64 * 2**10
MAX_UPLOAD_BYTES = 16 * 2**20
MAX_UPLOAD_PIXELS = 2**20
MAX_UPSCALED_PIXELS = 2**24  # of one request
KEPT_BYTES, KEPT_SECONDS = 64 * 2**20, 3600.0  # of images that are given by URL


@dataclass(frozen=True)
class Limits:
    """What `crescendo serve` is told."""

    queue: int = 64  # images that may wait
    timeout: float = 120.0  # seconds a request may take
    rate: float | None = None  # images a minute and client; None is no limit


class RateLimiter:
    """A token bucket for each client: `rate` images a minute, and as many at once. None is no limit."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: images left, when

    def wait_for(self, client: str, images: int) -> float:
        """Take `images` from a client's bucket, and return 0; or the seconds until it holds them."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        left, since = self._buckets.pop(client, (self._rate, now))
        left = min(self._rate, left + (now - since) * self._rate / 60)
        wanted = min(images, self._rate)  # else more than a minute's worth were never possible
        taken = wanted if wanted <= left else 0
        self._buckets[client] = left - taken, now
        while len(self._buckets) > 10_000:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (wanted - left) * 60 / self._rate


class Images(Protocol):
    """Where images that are given by URL are kept."""

    async def add(self, content: bytes) -> str:
        """Keep a file; its name."""
        ...

    async def get(self, name: str) -> bytes | None:
        """A file that is kept."""
        ...


class ImageStore:
    """PNG files in memory, under names that cannot be guessed: the newest, up to KEPT_BYTES and KEPT_SECONDS."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    async def add(self, content: bytes) -> str:
        """Keep a file; its name."""
        name = secrets.token_urlsafe(18)
        self._kept[name] = time.monotonic(), content
        self._bytes += len(content)
        while self._bytes > KEPT_BYTES or self._is_old():
            _, (_, gone) = self._kept.popitem(last=False)
            self._bytes -= len(gone)
        return name

    async def get(self, name: str) -> bytes | None:
        """A file that is kept."""
        stored, content = self._kept.get(name, (0.0, None))
        return None if content is None or time.monotonic() - stored > KEPT_SECONDS else content

    def _is_old(self) -> bool:
        return time.monotonic() - next(iter(self._kept.values()))[0] > KEPT_SECONDS
