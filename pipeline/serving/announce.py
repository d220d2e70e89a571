"""Services of a project that run on this machine: each tells where it answers, in the folder of runs."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import artifacts

FOLDER = "services"
TIMEOUT = 2.0  # seconds for an answer


@dataclass(frozen=True)
class Running:
    """A service whose process runs. version: that it serves, by its own word; None if it does not answer, or serves
    a folder. refused: why the version that its alias points to is not served."""

    url: str
    answers: bool
    version: str | None = None
    digest: str | None = None
    refused: str | None = None


@contextlib.contextmanager
def announced(runs: Path, url: str) -> Iterator[None]:
    """Tell, while the block runs, that this process serves at `url`."""
    place = runs / FOLDER / f"{os.getpid()}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_atomic(place, json.dumps({"url": url}))
    try:
        yield
    finally:
        place.unlink(missing_ok=True)


def running(runs: Path) -> Iterator[Running]:
    """The services that were announced and run. What one that was killed left is passed over."""
    for place in sorted((runs / FOLDER).glob("*.json")):
        if place.stem.isdecimal() and artifacts.is_alive(int(place.stem)):
            with contextlib.suppress(OSError, ValueError, KeyError):  # it has ended meanwhile
                yield _ask(str(json.loads(place.read_text(encoding="utf-8"))["url"]))


def _ask(url: str) -> Running:
    """What a service says of itself."""
    try:
        with urllib.request.urlopen(f"{url}readyz", timeout=TIMEOUT) as answer:
            said = json.load(answer)
    except (OSError, ValueError):
        return Running(url, answers=False)
    refused = said.get("refused") or {}
    reason = f"version {refused['version']}: {refused['reason']}" if refused else None
    return Running(url, True, said.get("version"), said.get("digest"), reason)
