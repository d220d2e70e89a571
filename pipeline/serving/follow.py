"""Following an alias of the registry: a version that it moves to is fetched, verified, warmed and swapped in.

One that cannot be used is refused, and the model before stays. It is tried again when the alias moves, and every
RETRY_SECONDS, since a disk may have been full.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass

from pipeline.errors import PipelineError, one_line
from pipeline.registry import champions
from pipeline.registry.package import Registry, Version
from pipeline.serving.metrics import Metrics
from pipeline.serving.model import Served, load_version

RETRY_SECONDS = 300.0


def log(line: str) -> None:
    """Print a line of the service's log."""
    print(one_line(line), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Refusal:
    """A version that is not served, and why."""

    version: Version
    reason: str
    when: float  # monotonic seconds


class Follower:
    """Looks where the alias at `address` points, every `seconds`, and loads a new version.

    model: what is served.
    refused: the version that the alias points to, where it cannot be used.
    unreachable: why the registry did not answer, where it did not.
    """

    def __init__(
        self,
        registry: Registry,
        address: str,
        model: Served,
        device: str,
        seconds: float,
        metrics: Metrics,
    ) -> None:
        self.model = model
        self.refused: Refusal | None = None
        self.unreachable: str | None = None
        self._registry, self._address, self._device = registry, address, device
        self._seconds = seconds
        self._metrics = metrics
        metrics.on_model(model)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="alias", daemon=True)

    def start(self) -> None:
        """Follow, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._seconds):
            self.look()

    def look(self) -> None:
        """Follow the alias once. Nothing is raised: the service goes on with what it has."""
        try:
            version = champions.resolve(self._registry, self._address)
        except Exception as error:
            self._metrics.registry_errors.inc()
            if self.unreachable is None:
                log(f"{self._address}: cannot be resolved, {self.model.label} stays: {error}")
            self.unreachable = _reason(error)
            return
        if self.unreachable is not None:
            log(f"{self._address}: can be resolved again")
        self.unreachable = None
        if version == self.model.version:
            self.refused = None
        elif not self._was_refused(version):
            self._take(version)

    def _was_refused(self, version: Version) -> bool:
        refused = self.refused
        return (
            refused is not None
            and refused.version == version
            and time.monotonic() - refused.when < RETRY_SECONDS
        )

    def _take(self, version: Version) -> None:
        try:
            model = load_version(self._registry, version, self._device)
        except Exception as error:
            self._metrics.refusals.inc()
            self.refused = Refusal(version, _reason(error), time.monotonic())
            log(f"{self._address}: version {version.number} is refused, {self.model.label} stays: {error}")
            return
        log(f"{self._address}: {model.label} is served, in place of {self.model.label}")
        self.model, self.refused = model, None
        self._metrics.swaps.inc()
        self._metrics.on_model(model)


def _reason(error: Exception) -> str:
    """What clients may be told: the one line of an error that is meant for users."""
    return str(error) if isinstance(error, PipelineError) else type(error).__name__
