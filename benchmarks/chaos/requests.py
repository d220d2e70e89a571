"""Bad requests to the registry: each is refused in one line with its status, and changes nothing.

They are made from lists: every command that takes an address with every bad address, every alias, version and store
that cannot be, and promotions of checkouts that are not as they should be. A batch is all of them in an order that
the seed shuffles, and then those of `forgeries.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from benchmarks.chaos import forks
from benchmarks.chaos.checkouts import spoiled
from benchmarks.chaos.commands import Answer, ask, registered
from benchmarks.chaos.forgeries import forged
from benchmarks.chaos.project import make_project, params_of, trusted
from benchmarks.chaos.results import Findings
from benchmarks.chaos.stores import Store
from pipeline.registry.promote import promote

CONFIG, DATA, MISSING, STORAGE, BUSY = 78, 65, 66, 74, 75
LONG = "x" * 300
ODD = (
    "\u0661", "caf\u00e9", "\U0001f4a5", "a\nb", "\x1b[31m", "\udcff", "\u202eb", "%00", "..%2f", "%252e%252e",
    "${jndi:x}", "{0.__class__}", "`id`", "$(id)", "a\tb",
)  # fmt: skip
ADDRESSES = (
    "models:", "models:/", "models://", "models:///1", "models:/crescendo", "models:/crescendo/",
    "models:/crescendo@", "models:/crescendo/latest", "models:/crescendo/-1", "models:/crescendo/1.0",
    "models:/crescendo/1e3", "models:/crescendo/1/2", "models:/crescendo/1@champion",
    "models:/crescendo@champion/1", "models:/a@b@c", "models:/crescendo/1?x=1", "models:/crescendo/1#x",
    "models:/x'@champion", "models:/x' OR '1'='1/1", "models:/../../etc/passwd", "models:/crescendo/../1",
    "MODELS:/crescendo/1", "runs:/0/model", "file:///etc/passwd", "http://127.0.0.1:9/#/../x",
    "s3://bucket/model", "/etc/passwd", "nowhere", *ODD, *(f"models:/{odd}" for odd in ODD),
)  # fmt: skip
NOT_THERE = (
    "models:/crescendo/0", "models:/crescendo/99", "models:/crescendo/00001", f"models:/crescendo/{10**30}",
    "models:/crescendo@nobody", "models:/Crescendo/1", "models:/other/1", "models:/other@champion",
    'models:/x"y/1', "models:/ crescendo/1", f"models:/{LONG}/1", f"models:/crescendo@{LONG}",
    "models:/..%2f..%2fetc/1", "models:/%/1", "models:/_/1", "models:/x;DROP TABLE x/1",
    "models:/crescendo/\u0661\u0662", "models:/crescendo.journal/99",
)  # fmt: skip
ALIASES = (
    "", " ", "1", "v1", "V2", "latest", "LATEST", "a b", "a/b", "a@b", "a:b", "_x", "../x", LONG, *ODD,
)  # fmt: skip
VERSIONS = (
    " ", "0", "-1", "99", "1.0", "v1", "latest", "champion", "None", "1 ", " 1", "01", "1;2", LONG,
    str(10**30), *ODD,
)  # fmt: skip
STORES = (
    "http://127.0.0.1:9", "http://me:secret@127.0.0.1:9", "https://127.0.0.1:9", "http://", "http://[",
    "http://no.such.host.invalid", "ftp://x", "nonsense://x", "sqlite:////dev/null/mlflow.db",
    "sqlite:////proc/mlflow.db", "sqlite:////etc", "sqlite:////etc/hostname", "databricks", "uc:x",
    "postgresql://me:secret@127.0.0.1:9/x", "mysql://127.0.0.1:9/x",
)  # fmt: skip
READERS = (
    ("generate", "cat", "--model"), ("trace",), ("diff", "models:/crescendo/1"), ("pin",), ("pin", "--baseline"),
    ("serve",), ("promote",), ("copy", "--to=http://127.0.0.1:9"), ("sign", "--key=nowhere.pem"),
)  # fmt: skip
STORE_USERS = (
    ("history",), ("verify",), ("fsck",), ("rollback",), ("promote",), ("promote", "--dry-run"),
    ("trace", "models:/crescendo/1"), ("generate", "cat"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A request and the statuses that it may end with."""

    kind: str
    words: tuple[str, ...]
    statuses: frozenset[int]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """For a line of findings."""
        return f"{self.kind}: {' '.join(map(ascii, self.words))} {dict(self.environment) or ''}"


def cases() -> list[Case]:
    """All requests to a registry that is as it should be."""
    absent = frozenset({CONFIG, MISSING})
    found = [
        # A file that is there is a picture to `trace`.
        Case("address", (*reader, each), absent | ({DATA} if reader == ("trace",) else set()))
        for reader in READERS
        for each in (*ADDRESSES, *NOT_THERE)
    ]
    found += [Case("alias", ("promote", f"--to={each}"), frozenset({CONFIG})) for each in ALIASES]
    found += [
        Case("expected version", ("promote", f"--expect={each}"), frozenset({BUSY})) for each in VERSIONS
    ]
    found += [Case("version", ("rollback", f"--to={each}"), frozenset({MISSING})) for each in VERSIONS]
    found += [
        Case("name", (reader, f"--name={each}"), frozenset({CONFIG}))
        for reader in ("history", "verify", "rollback", "fsck")
        for each in ("", " ", "a b", "a/b", "a'b", "crescendo.journal", LONG, *ODD)
    ]
    journal = "models:/crescendo.journal/1"
    found += [
        Case("journal", (*reader, journal), frozenset({STORAGE}))
        for reader in READERS
        if "trace" not in reader
    ]
    return found


def stores() -> list[Case]:
    """All requests to registries that are not there."""
    return [
        Case("store", user, frozenset({CONFIG, MISSING, STORAGE}), {"MLFLOW_TRACKING_URI": uri})
        for uri in STORES
        for user in STORE_USERS
    ]


def request(seed: int, folder: Path, store: Store) -> Findings:
    """One batch, in `folder`."""
    checkout, found = folder / "checkout", Findings()
    make_project(checkout, seed)
    (checkout / "dvc.yaml").touch()  # with `stages`, what makes a folder a project
    (checkout / "stages").mkdir()
    arguments = {"log": folder / "log", "environment": store.environment}
    forks.call(promote_here, checkout, **arguments)
    shuffled = cases()
    random.Random(f"requests-{seed}").shuffle(shuffled)
    groups = [forks.call(refused, checkout, shuffled, **arguments)]
    for uri in STORES:
        group = [case for case in stores() if uri in case.environment.values()]
        groups.append(forks.call(refused, checkout, group, **arguments))
    groups.append(forks.call(spoiled, checkout, **arguments))
    groups.append(forged(folder, checkout, store))
    for group in groups:
        found.counts += group.counts
        found.failures += group.failures
    return found


def promote_here(checkout: Path) -> None:
    """Promote the checkout's model."""
    with trusted():
        promote(checkout, params_of(checkout), log=lambda line: None)


def refused(checkout: Path, requests: list[Case]) -> Findings:
    """Make requests in a checkout: whether each is refused in one line, and changes nothing."""
    found = Findings()
    os.chdir(checkout)
    before = registered(checkout) if not requests[0].environment else None
    params = (checkout / "params.yaml").read_bytes()
    for case in requests:
        with mock.patch.dict(os.environ, case.environment), trusted(), impatient():
            answer = ask(case.words)
        judge(found, case, answer)
        found.require((checkout / "params.yaml").read_bytes() == params, f"{case} has changed params.yaml")
        if before is not None:
            found.require(registered(checkout) == before, f"{case} has changed the registry")
            before = registered(checkout)
    return found


def impatient() -> AbstractContextManager[object]:
    """Let MLflow try a database that does not answer once, and not for two minutes."""
    return mock.patch("mlflow.store.db.utils.MAX_RETRY_COUNT", 0)


def judge(found: Findings, case: Case, answer: Answer) -> None:
    """Whether a request was refused as it should be."""
    found.counts["requests"] += 1
    problem = answer.problem(case.statuses)
    if problem is None:
        found.counts["refused in one line"] += 1
    else:
        found.require(False, f"{case}: {problem}")
    found.require("secret" not in "".join(answer.lines), f"{case} tells the password")
