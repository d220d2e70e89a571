"""MLflow runs: one per stage, under one parent run per pipeline; metrics over nimg (training images seen).

The driver owns the run. Everything that is logged is an entry of the run's spool (spool.py), and is sent in order.
While the server is unreachable, entries wait there, one line says so, and the stage goes on. What still waits when
it ends is sent at the start of the next stage, or by `crescendo sync`.

Tags: `crescendo.kind` pipeline | stage | promote, `crescendo.pipeline` (identity of the parent), `crescendo.stage`,
`crescendo.run` (fingerprint of the stage), `input.<path>` and `output.<path>` (digests), `producer.<path>` (the run
that produced an input, found by its digest, even if DVC skipped that stage this time).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.tracking import entries
from pipeline.tracking.entries import Entry, Gone
from pipeline.tracking.runs import Pipeline, child_run, this_pipeline
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import connect, failures, one_line_of, quiet_mlflow, server_name, warn

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


LEASE = "lease"  # of a run folder
RETRY_SECONDS = 30.0  # pause after a failed request
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # errors that trying again does not mend


class Sender:
    """Sends what waits in a spool to its run. No method raises because of the server; bugs still do."""

    def __init__(self, root: Path, spool: Spool, server: str) -> None:
        self._root, self._spool, self._server = root, spool, server
        self._opened: tuple[MlflowClient, str, str] | None = None  # client, run, its parent
        self._warned = False
        self.lost = 0  # entries that can never be sent

    def send_all(self) -> bool:
        """Send what waits, in order; False if the server does not answer."""
        if self._spool.waiting:
            quiet_mlflow()
        while self._spool.waiting:
            first = self._spool.waiting[0]
            if not self._send(first.entry):
                return False
            if self._spool.waiting[0] is first:  # unless the run is a new one, which needs everything
                self._spool.sent()
        return True

    def _send(self, entry: Entry) -> bool:
        """True if the entry is finished: sent, or refused for good and therefore dropped."""
        try:
            client, run, parent = self._open(entry)
            if entry["kind"] == "begin":
                for run_id in (parent, run):
                    client.update_run(run_id, status="RUNNING")
            elif entry["kind"] == "end":
                for run_id in (run, parent):
                    client.set_terminated(run_id, entry["status"], entry["time"])
            else:
                entries.send(client, run, entry, self._root)
        except Gone as error:
            if not self._is_replaced(entry):
                self._lose(f"not logged: {error}")
        except failures() as error:
            if getattr(error, "error_code", "") not in REFUSED:
                self._on_failure(error)
                return False
            self._lose(f"MLflow refused: {one_line_of(error)}")
        return True

    def _open(self, entry: Entry) -> tuple[MlflowClient, str, str]:
        """The run of the pipeline that the newest `begin` names. Raises the exceptions of MLflow."""
        if self._opened is None or entry["kind"] == "begin":
            begin = entry if entry["kind"] == "begin" else self._spool.begin
            assert begin is not None, "a spool starts with `begin`"
            client, experiment = connect(self._root)
            pipeline, known = Pipeline(*begin["pipeline"]), self._spool.run_id
            stage, key, fresh = begin["stage"], begin["key"], begin["fresh"]
            run, parent = child_run(client, experiment, pipeline, "stage", stage, key, fresh, known)
            self._opened = client, run, parent
            self._spool.opened(run)
        return self._opened

    def _is_replaced(self, entry: Entry) -> bool:
        """Whether the same file waits once more, as it was later: MLflow keeps one of a name."""
        same = (entry["kind"], entry["path"], entry.get("folder"))
        later = (waiting.entry for waiting in islice(self._spool.waiting, 1, None))
        return any((each["kind"], each.get("path"), each.get("folder")) == same for each in later)

    def _lose(self, message: str) -> None:
        self.lost += 1
        warn(message)

    def _on_failure(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"MLflow at {self._server} does not answer; what is logged waits in {self._spool.path} "
                f"({one_line_of(error)})"
            )

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None while the server is unreachable."""
        return self._opened[1] if self._opened else None


class StageRun:
    """One stage's MLflow run; a context manager that ends it as FINISHED, FAILED or KILLED.

    Safe to call from several threads. No method raises because of the server; bugs still do.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        server = server_name(root)
        self._root, self._server = root, server
        self._spool = Spool(folder, server)
        self._sender = Sender(root, self._spool, server)
        self._retry_at = 0.0
        self._lock = threading.RLock()

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None while the server is unreachable."""
        return self._sender.run_id

    @property
    def pending(self) -> int:
        """Number of entries that wait for the server."""
        return len(self._spool.waiting)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, timestamp: float | None = None
    ) -> None:
        """`step` is nimg, `timestamp` in seconds since 1970 (default: now)."""
        when = time.time() if timestamp is None else timestamp
        self.log_batch([{"nimg": step, "time": when, "metrics": metrics}])

    def log_batch(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Lines of progress.jsonl, `{"nimg", "time", "metrics"}`; logged twice, they are stored once."""
        self._push(*entries.points(point for record in records for point in entries.points_of(record)))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested parameters; the run keeps those that it already has."""
        self._push({"kind": "params", "params": entries.flatten(params)})

    def log_image(self, path: str | Path, name: str, step: int) -> None:
        """A sample grid at `step` = nimg, which MLflow shows beside the metrics."""
        self._push_file(lambda: entries.image(Path(path), self._root, name, step))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a whole directory under its own name."""
        self._push_file(lambda: entries.file(Path(path), self._root, folder))

    def log_inputs(self, inputs: Mapping[str, str]) -> None:
        """{path: digest}; the run that produced an input is found by its digest and named in `producer.<path>`."""
        self._push({"kind": "inputs", "inputs": dict(inputs)})

    def log_outputs(self, outputs: Mapping[str, str]) -> None:
        """{path: digest}, by which this run can be found from now on."""
        self.set_tags({f"output.{path}": digest for path, digest in outputs.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Plain tags."""
        self._push({"kind": "tags", "tags": dict(tags)})

    def flush(self, patient: bool = True) -> bool:
        """Try to send what waits; True if nothing is left. `patient` waits RETRY_SECONDS after a failure."""
        with self._lock:
            if patient and time.monotonic() < self._retry_at:
                return False
            if self._sender.send_all():
                return True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False

    def __enter__(self) -> StageRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        with self._lock:
            self._spool.append([end(status)])
            if not self.flush(patient=False):
                what = describe_waiting(self._spool)
                warn(f"{what} wait in {self._spool.path}; `crescendo sync` sends them to {self._server}")

    def begin(self, stage: str, key: str, fresh: bool, code: Path | None = None) -> None:
        """The run of a stage with the fingerprint `key`. `fresh` does not continue a finished run. `code`: the
        repository, if it is not the root."""
        pipeline = list(this_pipeline(code or self._root))
        self._push({"kind": "begin", "stage": stage, "key": key, "fresh": fresh, "pipeline": pipeline})

    def _push_file(self, make: Callable[[], Entry]) -> None:
        try:
            entry = make()
        except (Gone, OSError) as error:
            warn(f"not logged: {error}")
            return
        self._push(entry)

    def _push(self, *new: Entry) -> None:
        with self._lock:
            self._spool.append(new)
            self.flush()


def end(status: str, when: float | None = None) -> Entry:
    """The entry that ends a run: FINISHED, FAILED or KILLED, at `when` in seconds since 1970 (default: now)."""
    return {"kind": "end", "status": status, "time": int((time.time() if when is None else when) * 1000)}


def describe_waiting(spool: Spool) -> str:
    """What waits, in words."""
    points = sum(len(waiting.entry.get("points", ())) for waiting in spool.waiting)
    others = sum(waiting.entry["kind"] != "points" for waiting in spool.waiting)
    return f"{points} points of metrics and {others} other entries"


def start_stage_run(
    stage: str,
    root: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    code: Path | None = None,
    folder: Path | None = None,
    fingerprint: str | None = None,
    fresh: bool = False,
) -> StageRun:
    """The run of `stage` under the pipeline's parent, to be used in a `with`; never raises for a missing server.

    `params`: nested parameters. `inputs`: {path: digest}. `code`: the repository, if `root`, where data, models and
    the store lie, is another folder. `fingerprint` of the stage (default: a digest of stage,
    params and inputs), by which a restart finds and continues its run. `folder`: the run folder, which holds the
    spool (default: that of the fingerprint in `runs`). `fresh`: the stage starts from scratch, so a finished run
    of that fingerprint is not continued, which would draw its curves twice.
    """
    root = Path(root).resolve()
    identity = json.dumps([stage, params, dict(inputs)], sort_keys=True, default=str)
    key = fingerprint or hashlib.sha256(identity.encode()).hexdigest()
    run = StageRun(root, folder or root / "runs" / stage / key[:16])
    run.begin(stage, key, fresh, code)
    run.log_params(params)
    run.log_inputs(inputs)
    return run
