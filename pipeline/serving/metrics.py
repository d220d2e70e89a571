"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from pipeline.serving.model import Served

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one service. `waiting` gives the number of images that wait."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "crescendo_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "crescendo_request_seconds",
            "Of a request.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_images = Histogram(
            "crescendo_batch_images",
            "Images of a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "crescendo_batch_seconds", "Computing a batch.", buckets=SECONDS, registry=registry
        )
        self.swaps = Counter("crescendo_model_swaps", "Versions swapped in.", registry=registry)
        self.refusals = Counter("crescendo_model_refusals", "Versions refused.", registry=registry)
        self.registry_errors = Counter(
            "crescendo_registry_errors", "Times that the registry did not answer.", registry=registry
        )
        self._model = Info("crescendo_model", "The model that is served.", registry=registry)
        Gauge("crescendo_waiting_images", "Images that wait.", registry=registry).set_function(waiting)

    def on_batch(self, images: int, seconds: float) -> None:
        """A batch is done."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def on_model(self, model: Served) -> None:
        """A model is served from now on."""
        self._model.info({"name": model.name, "version": model.number or "", "digest": model.digest})

    def text(self) -> bytes:
        """The metrics, in Prometheus's text format."""
        return generate_latest(self._registry)
