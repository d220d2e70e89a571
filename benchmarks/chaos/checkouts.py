"""Promotions of checkouts whose parameters, verdict, evidence or model are not as they should be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.chaos.commands import ask, registered
from benchmarks.chaos.project import MODEL, trusted
from benchmarks.chaos.results import Findings
from pipeline.config.strict_yaml import read_yaml
from pipeline.launch.scratch import write_params
from pipeline.registry.provenance import EVIDENCE, VERDICT

CONFIG, MISSING, DATA, STORAGE = 78, 66, 65, 74
CONTENTS = (
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"NaN", b"\xff\xfe{}", b"{}", b"[" * 100_000, b'{"a": 1}' * 2,
    b"\x00" * 100,
)  # fmt: skip
NAMES = ("", "a b", "a/b", "a'b", "a.journal", "x" * 101, "caf\u00e9", "a\nb", 3, None, [], {}, True)
FIELDS: dict[str, tuple[Any, ...]] = {
    "data_digest": (None, 3, "", "d" * 63, "D" * 64, "g" * 64),
    "model_digest": (None, [], "f" * 64),
    "evidence_digest": (None, "e"),
    "baseline": (None, {}, {"address": "x"}, {"address": 1, "model_digest": "c" * 64}),
    "is_refined": (None, "yes", 1),
    "verdicts": (None, [], [{}], [3], {}),
    "default_passes": (None, 2, 0, "1", 1.0, True),
    "refused": (None, [{}], 3),
    "unknown": (1,),
}


def spoiled(checkout: Path) -> Findings:
    """Promote in a checkout that was spoiled in each way: refused in one line, and nothing is registered."""
    found = Findings()
    os.chdir(checkout)
    before = registered(checkout)
    for kind, spoil, statuses, trust in ways(checkout):
        with restored(checkout), trust:
            spoil()
            answer = ask(("promote",))
        found.counts["requests"] += 1
        problem = answer.problem(statuses)
        found.counts["refused in one line"] += problem is None
        found.require(problem is None, f"checkout, {kind}: {problem}")
        found.require(registered(checkout) == before, f"checkout, {kind}: has changed the registry")
    return found


@contextmanager
def restored(checkout: Path) -> Iterator[None]:
    """Undo what happens to a checkout within the block."""
    kept = checkout.with_name("kept")
    shutil.copytree(checkout, kept, symlinks=True)
    try:
        yield
    finally:
        for path in checkout.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(kept, checkout, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(kept)


Way = tuple[str, Callable[[], object], frozenset[int], AbstractContextManager[None]]


def ways(checkout: Path) -> Iterator[Way]:
    """How a checkout is spoiled: (kind, how, statuses, whether its verdict is taken on trust)."""
    model, verdict = checkout / MODEL, checkout / VERDICT
    wrong = frozenset({DATA, MISSING})
    damaged = frozenset({DATA, MISSING, STORAGE})
    for content in CONTENTS:
        yield f"verdict {content[:12]!r}", writing(verdict, content), wrong, trusted()
        yield f"evidence {content[:12]!r}", writing(checkout / EVIDENCE, content), wrong, nullcontext()
        for name in ("manifest.json", "config.json", "model.safetensors"):
            yield f"{name} {content[:12]!r}", writing(model / name, content), damaged, trusted()
    for name, values in FIELDS.items():
        for value in values:
            yield f"verdict with {name} {value!r}", setting(verdict, name, value), wrong, trusted()
    yield "no evidence", removing(checkout / EVIDENCE), wrong, nullcontext()
    for path in (verdict, model, model / "manifest.json", model / "model.safetensors", model / "config.json"):
        for way, spoil in (
            ("missing", removing),
            ("a link", linking),
            ("a loop", looping),
            ("a folder", nesting),
        ):
            yield f"{path.name} is {way}", spoil(path), damaged, trusted()
    for value in NAMES:
        yield f"name {value!r}", naming(checkout, value), frozenset({CONFIG}), trusted()


def writing(path: Path, content: bytes) -> Callable[[], object]:
    """Write a file."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def setting(path: Path, name: str, value: Any) -> Callable[[], object]:
    """Change a field of a JSON file."""
    return lambda: path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


def removing(path: Path) -> Callable[[], None]:
    """Remove a file or a folder."""
    return lambda: shutil.rmtree(path) if path.is_dir() else path.unlink()


def linking(path: Path) -> Callable[[], None]:
    """A link that leads nowhere in its place."""

    def link() -> None:
        removing(path)()
        path.symlink_to("/nowhere")

    return link


def looping(path: Path) -> Callable[[], None]:
    """A link to itself in its place."""

    def loop() -> None:
        removing(path)()
        path.symlink_to(path)

    return loop


def nesting(path: Path) -> Callable[[], None]:
    """An empty folder in its place."""

    def nest() -> None:
        removing(path)()
        path.mkdir()

    return nest


def naming(checkout: Path, value: Any) -> Callable[[], object]:
    """Give the registered model another name."""

    def name() -> None:
        tree = read_yaml(checkout / "params.yaml")
        write_params(checkout, {**tree, "promotion": {**tree["promotion"], "name": value}})

    return name
