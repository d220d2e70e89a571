"""MLflow runs: one run a stage, under one parent run a pipeline; metrics over nimg (training images seen).

The driver owns the run. Everything that is logged goes through a queue in order: when the server is away the
queue waits, one line says so, and the stage goes on; its metrics also lie in `progress.jsonl` of its run folder.
Replaying is harmless: MLflow keys a metric point by (key, time stamp, step, run, value), and time stamps come
from the records. Only this module and `pipeline/registry/` import mlflow, and only when used.

Tags: `crescendo.kind` pipeline | stage | promote, `crescendo.pipeline` (which parent), `crescendo.stage`,
`crescendo.run` (the stage's fingerprint), `input.<path>` and `output.<path>` (digests), `producer.<path>` (the
run that made an input, found by its digest: also that of a stage which DVC skipped).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.tracking.runs import child_run, find_producer
from pipeline.tracking.store import connect, failures, one_line_of, public_uri, quiet_mlflow, tracking_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


BATCH_METRICS = 1000  # MLflow refuses more metrics than this in one request
RETRY_SECONDS = 30.0  # how long a server that failed is left alone
MAX_PARAM_CHARS = 6000  # MLflow cuts longer values without a word
Operation = Callable[["MlflowClient", str], None]


# What is logged.


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`: nested parameters as MLflow has them; lists become JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


@dataclass(frozen=True)
class Point:
    """One value of one metric; `timestamp` in milliseconds since 1970, `step` = nimg."""

    key: str
    value: float
    timestamp: int
    step: int


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """The points of one progress line `{"nimg": int, "time": s, "metrics": {name: float}}`."""
    return [
        Point(
            re.sub(r"[^\w\-. /:]", "_", str(key)),
            float(value),
            int(record["time"] * 1000),
            int(record["nimg"]),
        )
        for key, value in record.get("metrics", {}).items()
    ]


def _log_points(points: list[Point]) -> Operation:
    """Sends at most BATCH_METRICS points. Infinity, which MLflow turns into 1.8e308, becomes a tag."""

    def send(client: MlflowClient, run: str) -> None:
        from mlflow.entities import Metric

        finite = [Metric(p.key, p.value, p.timestamp, p.step) for p in points if not math.isinf(p.value)]
        if finite:
            client.log_batch(run, metrics=finite)
        for point in points:
            if math.isinf(point.value):
                client.set_tag(run, f"infinite.{point.key}", f"{point.value} at nimg {point.step}")

    return send


def _log_params(params: Mapping[str, str]) -> Operation:
    """Sends what the run lacks. A param cannot change: a continued run keeps its own, a tag tells the new."""

    def send(client: MlflowClient, run: str) -> None:
        from mlflow.entities import Param

        known = client.get_run(run).data.params
        cut = {key: value[:MAX_PARAM_CHARS] for key, value in params.items()}
        new = [Param(key, value) for key, value in cut.items() if key not in known]
        for start in range(0, len(new), 100):
            client.log_batch(run, params=new[start : start + 100])
        for key, value in cut.items():
            if known.get(key, value) != value:
                client.set_tag(run, f"param.{key}", value)

    return send


def _log_image(path: Path, name: str, step: int) -> Operation:
    """Sends a picture, unless the run has one of that name and step."""

    def send(client: MlflowClient, run: str) -> None:
        from PIL import Image

        stem = f"images/{name.replace('/', '#')}%step%{step}%"
        if any(item.path.startswith(stem) for item in client.list_artifacts(run, "images")):
            return
        with Image.open(path) as image:
            client.log_image(run, image.convert("RGB"), key=name, step=step)

    return send


class StageRun:
    """One stage's MLflow run; a context manager that ends it as FINISHED, FAILED or KILLED.

    Safe to call from several threads. No method raises because of the server; bugs still do.
    """

    def __init__(self, open_run: Callable[[], tuple[MlflowClient, str, str]], where: str) -> None:
        """`open_run` answers (client, run id, parent id); it is asked again later if it fails."""
        self._open_run = open_run
        self._where = where
        self._opened: tuple[MlflowClient, str, str] | None = None
        self._queue: deque[Operation] = deque()
        self._retry_at = 0.0
        self._warned = False
        self._lock = threading.RLock()

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None while the server is away."""
        return self._opened[1] if self._opened else None

    @property
    def pending(self) -> int:
        """How many operations wait for the server."""
        return len(self._queue)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, timestamp: float | None = None
    ) -> None:
        """`step` is nimg, `timestamp` in seconds since 1970 (now, if not given)."""
        when = time.time() if timestamp is None else timestamp
        self.log_batch([{"nimg": step, "time": when, "metrics": metrics}])

    def log_batch(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Sends lines of progress.jsonl, `{"nimg", "time", "metrics"}`; sent twice, they are there once."""
        points = [point for record in records for point in points_of(record)]
        self._push(
            *(_log_points(points[i : i + BATCH_METRICS]) for i in range(0, len(points), BATCH_METRICS))
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested parameters; those which the run already has stay."""
        self._push(_log_params(flatten(params)))

    def log_image(self, path: str | Path, name: str, step: int) -> None:
        """A sample grid at `step` = nimg, shown by MLflow beside the metrics."""
        self._push(_log_image(Path(path), name, step))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a whole directory under its own name."""
        source = Path(path)
        if source.is_dir():
            target = "/".join(part for part in (folder, source.name) if part)
            self._push(lambda client, run: client.log_artifacts(run, str(source), target))
        else:
            self._push(lambda client, run: client.log_artifact(run, str(source), folder))

    def log_inputs(self, inputs: Mapping[str, str]) -> None:
        """{path: digest}; the run that made an input is looked up by its digest and named in `producer.<path>`."""

        def send(client: MlflowClient, run: str) -> None:
            found = client.get_run(run)
            for path, digest in inputs.items():
                client.set_tag(run, f"input.{path}", digest)
                producer = find_producer(client, found.info.experiment_id, path, digest)
                if producer is not None and producer != run:
                    client.set_tag(run, f"producer.{path}", producer)

        self._push(send)

    def log_outputs(self, outputs: Mapping[str, str]) -> None:
        """{path: digest}, by which the run is found from then on."""

        def send(client: MlflowClient, run: str) -> None:
            for path, digest in outputs.items():
                client.set_tag(run, f"output.{path}", digest)

        self._push(send)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Plain tags."""

        def send(client: MlflowClient, run: str) -> None:
            for key, value in tags.items():
                client.set_tag(run, key, value)

        self._push(send)

    def flush(self, patient: bool = True) -> bool:
        """Tries to empty the queue; True if it is empty. Unless `patient`, asks a server that just failed again."""
        with self._lock:
            if patient and time.monotonic() < self._retry_at:
                return False
            if self._opened is None and not self._open():
                return False
            while self._queue:
                if not self._send(self._queue[0]):
                    return False
                self._queue.popleft()
            return True

    def __enter__(self) -> StageRun:
        self._push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"

        def end(client: MlflowClient, run: str) -> None:
            client.set_terminated(run, status)
            if self._opened is not None:
                client.set_terminated(self._opened[2], status)

        with self._lock:
            self._queue.append(end)
            if not self.flush(patient=False):
                _say(
                    f"{self.pending} requests were never sent to MLflow at {self._where}; progress.jsonl has them"
                )

    def _push(self, *operations: Operation) -> None:
        with self._lock:
            self._queue.extend(operations)
            self.flush()

    def _open(self) -> bool:
        quiet_mlflow()
        try:
            client, run, parent = self._open_run()
            for run_id in (parent, run):
                client.update_run(run_id, status="RUNNING")
        except failures() as error:
            self._away(error)
            return False
        self._opened = (client, run, parent)
        return True

    def _send(self, operation: Operation) -> bool:
        """True when the operation is done with: sent, or refused for good and therefore dropped."""
        assert self._opened is not None
        try:
            operation(self._opened[0], self._opened[1])
        except FileNotFoundError as error:
            _say(f"not logged: {error}")
        except failures() as error:
            if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                self._away(error)
                return False
            _say(f"MLflow refused: {one_line_of(error)}")
        return True

    def _away(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._warned:
            self._warned = True
            _say(f"MLflow at {self._where} does not answer; the stage goes on, its metrics lie in progress.jsonl "
                 f"of its run folder ({one_line_of(error)})")  # fmt: skip


def _say(message: str) -> None:
    print(f"warning: tracking: {message}", file=sys.stderr, flush=True)


def start_stage_run(
    stage: str,
    root: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    fingerprint: str | None = None,
    fresh: bool = False,
) -> StageRun:
    """The run of `stage` under the pipeline's parent, to be used in a `with`; never raises for a missing server.

    `params` nested parameters; `inputs` {path: digest}; `fingerprint` the stage's (default: a digest of stage,
    params and inputs), by which a restart finds and continues its run. `fresh` says that the stage starts from
    nothing: then a run of that fingerprint which has finished is left alone, so that no curve is drawn twice.
    """
    root = Path(root)
    identity = json.dumps([stage, params, dict(inputs)], sort_keys=True, default=str)
    key = fingerprint or hashlib.sha256(identity.encode()).hexdigest()

    def open_run() -> tuple[MlflowClient, str, str]:
        client, experiment = connect(root)
        run, parent = child_run(client, experiment, root, "stage", stage, key, unfinished=fresh)
        return client, run, parent

    run = StageRun(open_run, public_uri(tracking_uri(root)))
    run.log_params(params)
    run.log_inputs(inputs)
    return run
