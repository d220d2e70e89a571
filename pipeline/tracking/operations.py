"""Operations: what a stage logs, as functions that send it to an MLflow run.

They may be called again after a failure. Replaying is harmless: MLflow keys a metric point by (key, timestamp,
step, run, value), and timestamps come from the records.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.runs import find_producer

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


BATCH_METRICS = 1000  # MLflow refuses more metrics than this in one request
MAX_PARAM_CHARS = 6000  # MLflow truncates longer values silently
Operation = Callable[["MlflowClient", str], None]  # (client, run id)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`: nested parameters as MLflow stores them; lists become JSON."""
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


def log_points(points: list[Point]) -> Operation:
    """Logs at most BATCH_METRICS points. Infinity, which MLflow turns into 1.8e308, becomes a tag."""

    def send(client: MlflowClient, run: str) -> None:
        from mlflow.entities import Metric

        finite = [Metric(p.key, p.value, p.timestamp, p.step) for p in points if not math.isinf(p.value)]
        if finite:
            client.log_batch(run, metrics=finite)
        for point in points:
            if math.isinf(point.value):
                client.set_tag(run, f"infinite.{point.key}", f"{point.value} at nimg {point.step}")

    return send


def log_params(params: Mapping[str, str]) -> Operation:
    """Logs missing params. They cannot change: a continued run keeps its own, and a tag holds the new value."""

    def send(client: MlflowClient, run: str) -> None:
        from mlflow.entities import Param

        known = client.get_run(run).data.params
        values = {key: value[:MAX_PARAM_CHARS] for key, value in params.items()}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):
            client.log_batch(run, params=new[start : start + 100])
        for key, value in values.items():
            if known.get(key, value) != value:
                client.set_tag(run, f"param.{key}", value)

    return send


def log_image(path: Path, name: str, step: int) -> Operation:
    """Logs an image, unless the run has one of that name and step."""

    def send(client: MlflowClient, run: str) -> None:
        from PIL import Image

        stem = f"images/{name.replace('/', '#')}%step%{step}%"
        if any(item.path.startswith(stem) for item in client.list_artifacts(run, "images")):
            return
        with Image.open(path) as image:
            client.log_image(run, image.convert("RGB"), key=name, step=step)

    return send


def log_artifact(source: Path, folder: str | None) -> Operation:
    """Logs a file, or a whole directory under its own name."""

    def send(client: MlflowClient, run: str) -> None:
        if source.is_dir():
            client.log_artifacts(run, str(source), "/".join(filter(None, (folder, source.name))))
        else:
            client.log_artifact(run, str(source), folder)

    return send


def log_inputs(inputs: Mapping[str, str]) -> Operation:
    """Tags a run with digests {path: digest} of its inputs, and with the runs that produced them."""

    def send(client: MlflowClient, run: str) -> None:
        experiment = client.get_run(run).info.experiment_id
        for path, digest in inputs.items():
            client.set_tag(run, f"input.{path}", digest)
            producer = find_producer(client, experiment, path, digest)
            if producer is not None and producer != run:
                client.set_tag(run, f"producer.{path}", producer)

    return send


def set_tags(tags: Mapping[str, str]) -> Operation:
    """Sets tags of a run."""

    def send(client: MlflowClient, run: str) -> None:
        for key, value in tags.items():
            client.set_tag(run, key, value)

    return send
