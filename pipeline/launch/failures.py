"""Failures that a restart would only repeat, passed from a worker to the driver as JSON."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import PipelineError, describe
from pipeline.launch.worker import Worker, WorkerConfig

FAILURE = "failure.json"


def record_failure(worker: Worker, config: WorkerConfig) -> None:
    """Run `worker`; a failure that a restart would only repeat is written to `run_dir/failure.json`.

    It is also raised, since only Ray can stop the peers, which wait in a collective. The restart that follows
    finds the record and returns at once; `raise_failure` then raises it in the driver. Failures that a restart
    may fix leave no record: RuntimeError (a collective whose peer died, a device) and lost connections.
    """
    record = config.run_dir / FAILURE
    if record.exists():
        return
    try:
        worker(config)
    except (RuntimeError, ConnectionError, TimeoutError):
        raise
    except Exception as exc:
        artifacts.write_atomic(record, json.dumps(failure_record(exc)))
        raise


def failure_record(exc: Exception) -> dict[str, Any]:
    """An exception as JSON values, from which `raise_failure` builds it again; a bug as its traceback."""
    if isinstance(exc, PipelineError):
        return {"kind": type(exc).__name__, "args": list(exc.args)}
    if describe(exc) is not None and isinstance(exc, OSError):
        return {"kind": "OSError", "args": [exc.errno, exc.strerror or str(exc), str(exc.filename or "")]}
    return {"kind": "bug", "args": ["".join(traceback.format_exception(exc))]}


def raise_failure(run_dir: Path) -> None:
    """Raise the failure that a worker recorded, if any, and clear the record."""
    record = run_dir / FAILURE
    if not record.is_file():
        return
    failure = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    by_name = {kind.__name__: kind for kind in PipelineError.__subclasses__()}
    if failure["kind"] in by_name:
        raise by_name[failure["kind"]](*failure["args"])
    if failure["kind"] == "OSError":
        number, reason, filename = failure["args"]
        raise OSError(number, reason, filename) if filename else OSError(number, reason)
    raise RuntimeError(f"a training worker failed:\n{failure['args'][0]}")
