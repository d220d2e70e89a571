"""Registries that other software wrote to: versions without our tags, sources that lead elsewhere, odd journals.

Whatever a command meets there, it ends well or with one line, and never makes such a version the champion.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.chaos import forks
from benchmarks.chaos.commands import NAME, ask
from benchmarks.chaos.project import trusted
from benchmarks.chaos.results import Findings
from benchmarks.chaos.stores import SQLITE, Store
from pipeline.registry.journal import BEATS, MOVES, OPEN, PROCESS, REGISTERED, STATE, this_process
from pipeline.registry.package import CHAMPION, DEFAULT_TAG, DIGEST_TAG, PACKAGE_TAG, Registry, Version

REFUSED = frozenset({1, 65, 66, 74, 75, 77, 78})
SOURCES = (
    "file:///etc", "file:///etc/passwd", "/etc", "..", "http://127.0.0.1:9/x", "s3://nowhere/x", "models:/m-0",
    "models:/other/1", "crescendo:/journal", "runs:/0/model", "dbfs:/x", "mlflow-artifacts:/../../etc", "x:y",
)  # fmt: skip
TAGS: tuple[tuple[str, str], ...] = (
    (DIGEST_TAG, ""), (DIGEST_TAG, "0" * 64), (DIGEST_TAG, "caf\u00e9"), (DEFAULT_TAG, "0"), (DEFAULT_TAG, "x"),
    (DEFAULT_TAG, "\u0661"), (DEFAULT_TAG, "9" * 50), (PACKAGE_TAG, "0" * 64), (PACKAGE_TAG, "x"),
)  # fmt: skip
READERS = (("generate", "cat", "--num", "1"), ("verify",), ("pin", f"models:/{NAME}@{CHAMPION}"))
USERS = (("history",), ("verify",), ("promote",), ("rollback", "--to", "1"), ("fsck",))


def entries() -> list[dict[str, str]]:
    """Tags of odd entries of a journal."""
    machine = this_process().partition("/")[0]
    moves = ("[", "3", "null", "[3]", "[{}]", '[{"alias": 1, "before": null, "after": 2}]', "{}", "[[]]")
    registered = ("[", "3", "null", "[]", '{"x": 1}', '{"version": 7}', '{"version": null}', '[["version"]]')
    numbers = ("x", "-1", str(10**30), "")
    processes = ("", "x", "/", "a/b/c", "x" * 400, *(f"{machine}/{number}" for number in numbers))
    odd: list[dict[str, str]] = [{STATE: OPEN, PROCESS: process, BEATS: "x"} for process in processes]
    odd += [{STATE: state, MOVES: each} for each in moves for state in (OPEN, "done")]
    odd += [{STATE: state, REGISTERED: each} for each in registered for state in (OPEN, "done")]
    return [
        *odd,
        {},
        {STATE: "odd"},
        {STATE: "done", "crescendo.action": "\x1b[31m\n", "crescendo.who": "a\nb"},
    ]


def forged(folder: Path, checkout: Path, store: Store) -> Findings:
    """All commands on all forgeries, each on a copy of a SQLite store; nothing of another store."""
    found = Findings()
    if store.kind != SQLITE:
        return found
    original = Path(store.uri.removeprefix("sqlite:///")).parent
    for number, (kind, forge, commands, refused) in enumerate(forgeries()):
        copy = folder / f"forged-{number}"
        shutil.copytree(original, copy)
        environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{copy / 'mlflow.db'}"}
        part = forks.call(
            attack, checkout, kind, forge, commands, refused, log=folder / "log", environment=environment
        )
        found.counts += part.counts
        found.failures += part.failures
        shutil.rmtree(copy)
    return found


Forge = Callable[[Registry], object]
Forgery = tuple[str, Forge, tuple[tuple[str, ...], ...], bool]


def forgeries() -> list[Forgery]:
    """(kind, how, commands, whether they have to refuse)."""
    found: list[Forgery] = [
        (f"tag {name} {value[:20]!r}", tagging(name, value), READERS, True) for name, value in TAGS
    ]
    found += [(f"source {source}", foreign(source), READERS, True) for source in SOURCES]
    found += [(f"entry {tags}", entering(tags), USERS, False) for tags in entries()]
    return found


def tagging(name: str, value: str) -> Forge:
    """Change a tag of version 1."""
    return lambda registry: registry.set_tags(Version(NAME, "1"), {name: value})


def foreign(source: str) -> Forge:
    """A version of this source, made the champion by hand."""

    def forge(registry: Registry) -> None:
        client, _ = registry.connection
        version = client.create_model_version(
            NAME, source, tags={DIGEST_TAG: "1" * 64}, await_creation_for=None
        )
        client.set_registered_model_alias(NAME, CHAMPION, version.version)

    return forge


def entering(tags: Mapping[str, str]) -> Forge:
    """An odd entry in the journal."""
    return lambda registry: registry.create_entry(f"{NAME}.journal", tags)


def attack(
    checkout: Path, kind: str, forge: Forge, commands: tuple[tuple[str, ...], ...], refused: bool
) -> Findings:
    """Forge something, and run commands on it."""
    found = Findings()
    os.chdir(checkout)
    params = (checkout / "params.yaml").read_bytes()
    try:
        forge(Registry(checkout))
    except Exception as error:
        found.counts["forgeries that MLflow refuses"] += 1
        print(f"{kind}: {error}")
        return found
    for words in commands:
        with trusted():
            answer = ask(words)
        found.counts["requests"] += 1
        (checkout / "params.yaml").write_bytes(params)
        problem = answer.problem(REFUSED)
        if answer.status == 0 and not refused:
            found.counts["survived"] += 1
        elif problem is None:
            found.counts["refused in one line"] += 1
        else:
            found.require(False, f"forgery, {kind}: {' '.join(words)}: {problem}")
    return found
