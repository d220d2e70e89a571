"""Entries: what a stage logs, as JSON, and how each kind is sent to an MLflow run.

An entry may be sent again after a failure. This changes nothing: MLflow identifies a point of a metric by key,
timestamp, step, run and value, and the timestamps are part of the entries.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import artifacts
from pipeline.tracking.runs import find_producer

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BATCH_METRICS = 1000  # MLflow refuses more metrics than this in one request
MAX_PARAM_CHARS = 6000  # MLflow truncates longer values silently
Entry = dict[str, Any]  # {"kind": one of SENDERS, ...}


class Gone(Exception):
    """A file to log is missing, or another one by now: it cannot be sent any more."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`: nested parameters as MLflow stores them; lists become JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


class Point(NamedTuple):
    """One value of one metric; `timestamp` in milliseconds since 1970, `step` = nimg."""

    key: str
    value: float
    timestamp: int
    step: int


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """The points of one progress line `{"nimg": int, "time": s, "metrics": {name: float}}`."""
    when, step = int(record["time"] * 1000), int(record["nimg"])
    return [
        Point(re.sub(r"[^\w\-. /:]", "_", str(key)), float(value), when, step)
        for key, value in record.get("metrics", {}).items()
    ]


def points(values: Iterable[Point]) -> list[Entry]:
    """Points, at most BATCH_METRICS an entry."""
    rows = [list(point) for point in values]
    return [
        {"kind": "points", "points": rows[i : i + BATCH_METRICS]} for i in range(0, len(rows), BATCH_METRICS)
    ]


def file(path: Path, root: Path, folder: str | None) -> Entry:
    """A file, or a whole directory under its own name, as it is now. Raises Gone where there is none."""
    return {"kind": "file", "path": _relative(path, root), "digest": content_digest(path), "folder": folder}


def image(path: Path, root: Path, name: str, step: int) -> Entry:
    """An image at `step` = nimg. Raises Gone where there is none."""
    digest = content_digest(path)
    return {"kind": "image", "path": _relative(path, root), "digest": digest, "name": name, "step": step}


def content_digest(path: Path) -> str:
    """Digest of a file, or of all files of a directory. Raises Gone where there is none."""
    if path.is_file():
        return artifacts.sha256_file(path)
    if not path.is_dir():
        raise Gone(f"{path} is missing")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return artifacts.digest(
        {file.relative_to(path).as_posix(): artifacts.sha256_file(file) for file in files}
    )


def _relative(path: Path, root: Path) -> str:
    """The path from `root`, which may move, if it lies there."""
    absolute = root / path
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def send(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    """Send an entry to a run. Raises the exceptions of MLflow, and Gone."""
    SENDERS[entry["kind"]](client, run, entry, root)


def _send_points(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    """Infinity, which MLflow turns into 1.8e308, becomes a tag."""
    from mlflow.entities import Metric

    points = [Point(*row) for row in entry["points"]]
    finite = [Metric(p.key, p.value, p.timestamp, p.step) for p in points if not math.isinf(p.value)]
    if finite:
        client.log_batch(run, metrics=finite)
    for point in points:
        if math.isinf(point.value):
            client.set_tag(run, f"infinite.{point.key}", f"{point.value} at nimg {point.step}")


def _send_params(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    """They cannot change: a continued run keeps its own, and a tag holds the new value."""
    from mlflow.entities import Param

    known = client.get_run(run).data.params
    values = {key: value[:MAX_PARAM_CHARS] for key, value in entry["params"].items()}
    new = [Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(new), 100):
        client.log_batch(run, params=new[start : start + 100])
    for key, value in values.items():
        if known.get(key, value) != value:
            client.set_tag(run, f"param.{key}", value)


def _send_tags(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    for key, value in entry["tags"].items():
        client.set_tag(run, key, value)


def _send_inputs(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    """Tags with the digests {path: digest} of inputs, and with the runs that produced them."""
    experiment = client.get_run(run).info.experiment_id
    for path, digest in entry["inputs"].items():
        name = path.replace("://", ":/")  # as MLflow wants keys
        client.set_tag(run, f"input.{name}", digest)
        producer = find_producer(client, experiment, path, digest)
        if producer is not None and producer != run:
            client.set_tag(run, f"producer.{name}", producer)


def _send_image(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    """Unless the run has one of that name and step. A kill may have left one without its thumbnail, which MLflow
    writes last: such a one is written again, in its place."""
    from mlflow.tracking.multimedia import compress_image_size
    from PIL import Image

    name, step = entry["name"], entry["step"]
    paths = [item.path for item in client.list_artifacts(run, "images")]
    known = [path for path in paths if is_image(path, name, step)]
    if any(path.endswith(".webp") for path in known):
        return
    with Image.open(_unchanged(entry, root)) as image:
        picture = image.convert("RGB")
    if not known:
        client.log_image(run, picture, key=name, step=step)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(known[0]).name)
        picture.save(path)
        thumbnail = path.with_name(f"{path.stem}+compressed.webp")
        compress_image_size(picture).save(thumbnail)
        for each in (path, thumbnail):
            client.log_artifact(run, str(each), "images")
    client.set_tag(run, "mlflow.loggedImages", "True")


def is_image(path: str, name: str, step: int) -> bool:
    """Whether an artifact is the image of a name and step, or its thumbnail: MLflow puts `+` between the parts of
    its name, and `~` for `/`; earlier versions `%` and `#`."""
    parts = re.split(r"[+%]", path.removeprefix("images/").replace("~", "/").replace("#", "/"))
    return parts[:3] == [name, "step", str(step)]


def _send_file(client: MlflowClient, run: str, entry: Entry, root: Path) -> None:
    path, folder = _unchanged(entry, root), entry["folder"]
    if path.is_dir():
        client.log_artifacts(run, str(path), "/".join(filter(None, (folder, path.name))))
    else:
        client.log_artifact(run, str(path), folder)


def _unchanged(entry: Entry, root: Path) -> Path:
    """The path of an entry. Raises Gone unless it has the content that was logged."""
    path = root / entry["path"]
    if content_digest(path) != entry["digest"]:
        raise Gone(f"{path} has changed since")
    return path


SENDERS: dict[str, Callable[[MlflowClient, str, Entry, Path], None]] = {
    "points": _send_points,
    "params": _send_params,
    "tags": _send_tags,
    "inputs": _send_inputs,
    "image": _send_image,
    "file": _send_file,
}
