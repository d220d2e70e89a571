"""MLflow runs: one per stage, under one parent run per pipeline; metrics over nimg (training images seen).

The driver owns the run. Everything that is logged passes through a queue, in order: while the server is
unreachable the queue waits, one line says so, and the stage goes on; its metrics are also in `progress.jsonl` of
its run folder.

Tags: `crescendo.kind` pipeline | stage | promote, `crescendo.pipeline` (identity of the parent), `crescendo.stage`,
`crescendo.run` (fingerprint of the stage), `input.<path>` and `output.<path>` (digests), `producer.<path>` (the run
that produced an input, found by its digest, even if DVC skipped that stage this time).
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.tracking import operations
from pipeline.tracking.operations import BATCH_METRICS, Operation
from pipeline.tracking.runs import child_run
from pipeline.tracking.store import connect, failures, one_line_of, public_uri, quiet_mlflow, tracking_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


RETRY_SECONDS = 30.0  # pause after a failed request


class StageRun:
    """One stage's MLflow run; a context manager that ends it as FINISHED, FAILED or KILLED.

    Safe to call from several threads. No method raises because of the server; bugs still do.
    """

    def __init__(self, open_run: Callable[[], tuple[MlflowClient, str, str]], where: str) -> None:
        """`open_run` returns (client, run id, parent id); it is called again later if it fails."""
        self._open_run = open_run
        self._where = where
        self._opened: tuple[MlflowClient, str, str] | None = None
        self._queue: deque[Operation] = deque()
        self._retry_at = 0.0
        self._warned = False
        self._lock = threading.RLock()

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None while the server is unreachable."""
        return self._opened[1] if self._opened else None

    @property
    def pending(self) -> int:
        """Number of operations that wait for the server."""
        return len(self._queue)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, timestamp: float | None = None
    ) -> None:
        """`step` is nimg, `timestamp` in seconds since 1970 (default: now)."""
        when = time.time() if timestamp is None else timestamp
        self.log_batch([{"nimg": step, "time": when, "metrics": metrics}])

    def log_batch(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Lines of progress.jsonl, `{"nimg", "time", "metrics"}`; logged twice, they are stored once."""
        points = [point for record in records for point in operations.points_of(record)]
        batches = (points[i : i + BATCH_METRICS] for i in range(0, len(points), BATCH_METRICS))
        self._push(*map(operations.log_points, batches))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested parameters; the run keeps those that it already has."""
        self._push(operations.log_params(operations.flatten(params)))

    def log_image(self, path: str | Path, name: str, step: int) -> None:
        """A sample grid at `step` = nimg, which MLflow shows beside the metrics."""
        self._push(operations.log_image(Path(path), name, step))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a whole directory under its own name."""
        self._push(operations.log_artifact(Path(path), folder))

    def log_inputs(self, inputs: Mapping[str, str]) -> None:
        """{path: digest}; the run that produced an input is found by its digest and named in `producer.<path>`."""
        self._push(operations.log_inputs(inputs))

    def log_outputs(self, outputs: Mapping[str, str]) -> None:
        """{path: digest}, by which this run can be found from now on."""
        self._push(operations.set_tags({f"output.{path}": digest for path, digest in outputs.items()}))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Plain tags."""
        self._push(operations.set_tags(tags))

    def flush(self, patient: bool = True) -> bool:
        """Tries to empty the queue; True if it is empty. `patient` waits RETRY_SECONDS after a failure."""
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
                _warn(f"{self.pending} requests were not sent to MLflow at {self._where}; see progress.jsonl")

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
            self._on_failure(error)
            return False
        self._opened = (client, run, parent)
        return True

    def _send(self, operation: Operation) -> bool:
        """True if the operation is finished: sent, or refused for good and therefore dropped."""
        assert self._opened is not None
        try:
            operation(self._opened[0], self._opened[1])
        except FileNotFoundError as error:
            _warn(f"not logged: {error}")
        except failures() as error:
            if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                self._on_failure(error)
                return False
            _warn(f"MLflow refused: {one_line_of(error)}")
        return True

    def _on_failure(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._warned:
            self._warned = True
            _warn(
                f"MLflow at {self._where} does not answer; the stage goes on, its metrics are in progress.jsonl "
                f"of its run folder ({one_line_of(error)})"
            )


def _warn(message: str) -> None:
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

    `params`: nested parameters. `inputs`: {path: digest}. `fingerprint` of the stage (default: a digest of stage,
    params and inputs), by which a restart finds and continues its run. `fresh`: the stage starts from scratch, so a
    finished run of that fingerprint is not continued, which would draw its curves twice.
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
