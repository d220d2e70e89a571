"""What a stage is computed with, besides code, data and parameters: processor, Python, libraries, settings.

No result holds it, but it may decide the last bits. The run folder keeps it (MADE_ON), and so does the MLflow run:
when a registered version is made again, that tells what was different.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from pipeline import artifacts
from pipeline.errors import StorageError

MADE_ON = "made_on.json"
LOCK = "requirements.lock"
TAG = "machine."  # how tags of an MLflow run begin
CPU_INFO = Path("/proc/cpuinfo")
VECTORS = re.compile(
    r"(avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm)\w*"
)  # that libraries choose their kernels by
# By which a user makes libraries compute otherwise.
SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
THEN = ", then "  # between the facts of a run that went on elsewhere
MAX_PACKAGES = 4000  # characters; MLflow refuses tags of more than 5000

Facts = Mapping[str, str]


def facts_here(lock: Path) -> dict[str, str]:
    """Facts of this process. packages: JSON of {name: version} that are not as in the lock file."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    vectors = sorted(flag for flag in (flags[1].split() if flags else ()) if VECTORS.fullmatch(flag))
    return {
        "processor": model[1] if model else platform.machine(),
        "instructions": " ".join(vectors),
        "settings": " ".join(f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)),
        "python": platform.python_version(),
        "packages": _shortened(unlike_lock(lock)),
    }


def _shortened(packages: Mapping[str, str]) -> str:
    """JSON of packages, as many as a tag holds; the last one counts the others."""
    fit = dict(packages)
    while len(artifacts.canonical_json(fit)) > MAX_PACKAGES:
        fit.popitem()
    more = len(packages) - len(fit)
    return artifacts.canonical_json({**fit, "others": f"{more} more"} if more else fit)


def pins(lock: Path) -> dict[str, str]:
    """{package: version} that a lock file has for this interpreter and system; nothing without a file."""
    if not lock.is_file():
        return {}
    entries = re.findall(r"^([A-Za-z0-9][^\\#\n]*?==[^\\\n]*?)\s*\\?$", lock.read_text(), re.MULTILINE)
    needed = (each for each in map(Requirement, entries) if each.marker is None or each.marker.evaluate())
    return {each.name: next(iter(each.specifier)).version for each in needed}


def installed(name: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unlike_lock(lock: Path) -> dict[str, str]:
    """{package: version here, or `missing`} of those that are not as in the lock file."""
    found = {name: (pin, installed(name) or "missing") for name, pin in pins(lock).items()}
    return {name: version for name, (pin, version) in found.items() if version != pin}


def begin(run_dir: Path, facts: Facts, fresh: bool) -> None:
    """Record the facts of a run that begins (`fresh`), or goes on here; nothing where it has finished."""
    path = run_dir / MADE_ON
    if (run_dir / "result").exists():
        return
    before = {} if fresh else _read(path)
    merged = {name: _appended(before.get(name, value), value) for name, value in facts.items()}
    if merged != before:
        artifacts.write_atomic(path, json.dumps(merged, indent=1) + "\n")


def _appended(before: str, value: str) -> str:
    return before if before.split(THEN)[-1] == value else before + THEN + value


def recorded(run_dir: Path) -> dict[str, str]:
    """Facts of a run, with those that its checkpoints have (numerics.py): precision, device, torch, compile."""
    facts = {**_read(run_dir / MADE_ON), **next(_numerics(run_dir), {})}
    if "device" in facts:  # names the processor, where it is one
        facts.pop("processor", None)
    return facts


def _read(path: Path) -> dict[str, str]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in facts.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _numerics(run_dir: Path) -> Iterator[dict[str, str]]:
    for folder in (run_dir / "checkpoints", *sorted(run_dir.glob("*/checkpoints"))):
        for checkpoint in sorted(folder.glob("nimg-*"), reverse=True):
            with contextlib.suppress(StorageError):
                yield dict(artifacts.read_manifest(checkpoint)["meta"].get("numerics", {}))
