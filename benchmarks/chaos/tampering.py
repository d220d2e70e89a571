"""Files of a champion are changed after its registration, and everything that would use it refuses, naming them.

A batch is some changes, each of a random file and kind, on a fresh registered model: a bit, a byte more, a piece
less, another file's content, no file, another name, a folder or a link in its place, a new file, byte code. Each
change is undone before the next.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos import forks
from benchmarks.chaos.project import make_project, params_of, trusted
from benchmarks.chaos.results import Findings
from benchmarks.chaos.stores import Store
from pipeline.cli.models import load_model
from pipeline.errors import InputMissing, PipelineError, StorageError
from pipeline.registry import champions, pins
from pipeline.registry.package import CHAMPION, Registry
from pipeline.registry.packaging import NO_CACHE
from pipeline.registry.promote import promote
from pipeline.registry.repair import verify
from pipeline.serving.model import load_version

CHANGES = 100
PASSED_OVER = "registered_model_meta"  # which MLflow adds to what it downloads

Change = Callable[[Path, random.Random, list[Path]], None]


def flip(file: Path, draw: random.Random, _: list[Path]) -> None:
    """One bit."""
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def lengthen(file: Path, draw: random.Random, _: list[Path]) -> None:
    """Some bytes more."""
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def shorten(file: Path, draw: random.Random, _: list[Path]) -> None:
    """A piece less, as of an upload that was cut."""
    os.truncate(file, draw.randrange(file.stat().st_size))


def swap(file: Path, draw: random.Random, others: list[Path]) -> None:
    """The content of another file."""
    content = file.read_bytes()
    different = [other for other in others if other.read_bytes() != content]
    file.write_bytes(draw.choice(different).read_bytes())


def remove(file: Path, _: random.Random, __: list[Path]) -> None:
    """No file."""
    file.unlink()


def rename(file: Path, _: random.Random, __: list[Path]) -> None:
    """Another name."""
    file.rename(file.with_name(f"{file.name}.bak"))


def replace_by_folder(file: Path, _: random.Random, __: list[Path]) -> None:
    """A folder in its place."""
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path, _: random.Random, __: list[Path]) -> None:
    """A link that leads nowhere."""
    file.unlink()
    file.symlink_to("/nowhere")


def cache(file: Path, draw: random.Random, _: list[Path]) -> None:
    """Byte code, in place of the file that keeps it out."""
    folder = file.with_name(NO_CACHE)
    folder.unlink(missing_ok=True)
    folder.mkdir()
    folder.joinpath(f"{file.stem}.cpython-311.pyc").write_bytes(draw.randbytes(32))


def add(file: Path, draw: random.Random, _: list[Path]) -> None:
    """A new file beside it."""
    file.with_name(f"added-{draw.randrange(10**6)}.py").write_bytes(draw.randbytes(32))


CHANGE: dict[str, Change] = {
    "flipped": flip,
    "lengthened": lengthen,
    "shortened": shorten,
    "swapped": swap,
    "removed": remove,
    "renamed": rename,
    "replaced by a folder": replace_by_folder,
    "replaced by a link": replace_by_link,
    "added": add,
    "byte code": cache,
}


def tamper(seed: int, folder: Path, store: Store, changes: int = CHANGES) -> Findings:
    """One batch, in `folder`."""
    if store.models is None:
        raise InputMissing("E-INP-045", store.uri, "its files are not on this machine", "leave --server out")
    name = f"tamper-{seed}-{random.Random(f'tamper-{seed}').randrange(16**6):06x}"
    checkout = folder / "checkout"
    make_project(checkout, seed, name)
    arguments = (checkout, name, seed, store.models, changes)
    return forks.call(attack, *arguments, log=folder / "log", environment=store.environment)


def attack(checkout: Path, name: str, seed: int, models: Path, changes: int) -> Findings:
    """Register a model, and change its files again and again."""
    draw, found = random.Random(f"tampering-{seed}"), Findings()
    promote_here(checkout)
    registry = Registry(checkout)
    client, _ = registry.connection
    version = client.get_model_version_by_alias(name, CHAMPION)
    files = models / str(version.source).rpartition("/")[2] / "artifacts"
    judge(found, "untouched", checkout, name, refused=False)
    for number in range(changes):
        kind = list(CHANGE)[number % len(CHANGE)]
        present = [path for path in sorted(files.rglob("*")) if counts(path)]
        chosen = draw.choice(
            [path for path in present if kind not in ("flipped", "shortened") or path.stat().st_size]
        )
        shown = f"{kind}: {chosen.relative_to(files)}"
        with changed(files):
            CHANGE[kind](chosen, draw, present)
            judge(found, shown, checkout, name, refused=True)
        found.counts["changes"] += 1
    judge(found, "all undone", checkout, name, refused=False)
    return found


def counts(path: Path) -> bool:
    """Whether a path is a file of a model."""
    return path.is_file() and path.name != PASSED_OVER


@contextmanager
def changed(files: Path) -> Iterator[None]:
    """What happens to a folder within the block is undone."""
    kept = files.with_name("kept")
    shutil.copytree(files, kept)
    try:
        yield
    finally:
        shutil.rmtree(files)
        kept.rename(files)


def promote_here(checkout: Path) -> None:
    """Promote the checkout's model."""
    with trusted():
        promote(checkout, params_of(checkout), log=lambda line: None)


def users(checkout: Path, name: str) -> dict[str, Callable[[], object]]:
    """What uses a champion, by name."""
    registry, uri = Registry(checkout), f"models:/{name}@{CHAMPION}"

    def served() -> object:
        return load_version(registry, champions.resolve(registry, uri), "cpu")

    return {
        "generate": lambda: load_model(uri, checkout),
        "serve": served,
        "promote": lambda: promote_here(checkout),
        "rollback": lambda: champions.rollback(checkout, name, "1", log=lambda line: None),
        "verify": lambda: verify(checkout, name, log=lambda line: None),
        "pin": lambda: pins.resolve(checkout, uri),
    }


def judge(found: Findings, what: str, checkout: Path, name: str, refused: bool) -> None:
    """Whether everything refuses the champion, or takes it."""
    for user, use in users(checkout, name).items():
        try:
            use()
            said: Exception | None = None
        except Exception as error:
            said = error
        if not refused:
            found.require(said is None, f"{what}: {user} says {said!r}")
        elif isinstance(said, StorageError) and len(str(said).splitlines()) == 1:
            found.counts["refused"] += 1
        else:
            kind = "refuses with" if isinstance(said, PipelineError) else "does not refuse:"
            found.require(False, f"{what}: {user} {kind} {said!r}")
