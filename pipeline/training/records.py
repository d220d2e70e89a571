"""Files in a run folder, by name. Of JSON lines: progress.jsonl, and notices.jsonl with what a user should know.

Each line is a record {"nimg", "time", "metrics" or "text", ...}; in progress.jsonl also "start", the images trained
before its round, and "total". A damaged line costs itself and is named; it is never a traceback. Standard library
only.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import one_line

NOTICES = "notices.jsonl"
STOP = "stop"  # a file in a run folder that asks the run to stop
FILM = "film.png"  # the film strip, in the run folder while a stage trains, then in its reports
Record = dict[str, Any]


class Lines(NamedTuple):
    """Records in order, and the numbers (from 1) of damaged lines, each with the nimg of the record before it."""

    records: list[Record]
    damaged: list[tuple[int, int]]


def parse_record(line: bytes) -> Record | None:
    """A line as a record; None where it is damaged: not JSON, without a key, or with values that are not finite."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("nimg")) is not int:
        return None
    metrics = record.get("metrics", {} if isinstance(record.get("text"), str) else None)
    numbers = [record.get("time"), *(metrics.values() if isinstance(metrics, dict) else [None])]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return None
    return record


def parse_lines(data: bytes) -> Lines:
    """The lines of a file; an incomplete last one counts as damaged."""
    lines = Lines([], [])
    for number, line in enumerate(data.split(b"\n"), 1):
        record = parse_record(line)
        if record is not None:
            lines.records.append(record)
        elif line.strip():
            lines.damaged.append((number, lines.records[-1]["nimg"] if lines.records else 0))
    return lines


def read_records(path: Path) -> list[Record]:
    """Records of a file, without damaged lines; none where there is no file."""
    return parse_lines(path.read_bytes()).records if path.exists() else []


def truncate(path: Path, nimg: int, start: int = 0) -> None:
    """Drop the records of steps that will be repeated, and damaged lines, which are named on stderr.

    These are the steps beyond image `nimg` of the round that began after `start` images, all of its records where
    `nimg` is 0, and those of later rounds. The record of a round's beginning and that of the end of the one before
    have the same clock; each has the `start` of its own round."""
    lines = parse_lines(path.read_bytes()) if path.exists() else Lines([], [])
    if lines.damaged:
        warn(f"{path}: {dropped(lines.damaged, start + nimg)}")
    temporary = path.with_suffix(".tmp")

    def stays(record: Record) -> bool:
        began = record.get("start", 0)
        return bool(began < start or (began == start and nimg > 0 and record["nimg"] <= start + nimg))

    kept = [record for record in lines.records if stays(record)]
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)


def dropped(damaged: Sequence[tuple[int, int]], nimg: int) -> str:
    """What is lost by dropping damaged lines, in a run that goes on from image `nimg`."""
    numbers = ", ".join(str(number) for number, _ in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
    what = f"damaged line {numbers}" if len(damaged) == 1 else f"{len(damaged)} damaged lines ({numbers})"
    lost = sorted({after for _, after in damaged if after < nimg})
    if not lost:
        return f"{what} dropped; these metrics are beyond image {nimg}, and are written again"
    images = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
    return f"{what} dropped; the metrics that followed image {images} are lost"


def warn(text: str) -> None:
    """One line on stderr."""
    print(one_line(f"warning: {text}"), file=sys.stderr, flush=True)


def notice(folder: Path, nimg: int, text: str, details: Mapping[str, Any] | None = None) -> None:
    """Say something on stderr, and append it with `details` to notices.jsonl in a run folder, where the driver sees
    what Ray's workers say. A full disk costs the record, not the run."""
    warn(text)
    record = {"nimg": nimg, "time": time.time(), "pid": os.getpid(), "text": text, **(details or {})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / NOTICES, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        warn(f"{folder / NOTICES}: {error}")
