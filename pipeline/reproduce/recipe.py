"""What a registered version says of how it was made: commit, files, stages, and the digests of all that they
made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadData, InputMissing
from pipeline.launch.machine import Facts
from pipeline.launch.stage import PREPARED
from pipeline.registry.package import Registry, Version
from pipeline.registry.packaging import PROJECT
from pipeline.registry.provenance import LINEAGE


@dataclass(frozen=True)
class Recipe:
    """A version. model: its folder in a project. files: folder with params.yaml, dvc.lock, requirements.lock, a
    patch and lineage.json, those that there are. snapshot: the model itself. digests: of inputs and outputs of
    its stages, by path. facts: what each stage was computed with (launch/machine.py). seconds: that each
    took."""

    uri: str
    model: str
    digest: str
    commit: str
    files: Path
    snapshot: Path
    digests: Mapping[str, str]
    facts: Mapping[str, Facts]
    seconds: Mapping[str, float]

    def digest_of(self, path: str) -> str | None:
        """Digest of what lay at `path`, a file, folder or URL, when the version was made; None if that is
        unknown."""
        return self.digests.get(path.replace("://", ":/"))  # as tags of MLflow have it


def read_recipe(registry: Registry, version: Version, folder: Path) -> Recipe:
    """Fetch and verify a version into `folder`, and read its recipe.

    Raises InputMissing where it has none, BadData where its stages do not fit together, StorageError where its
    files were changed."""
    snapshot = registry.fetch(version, folder)
    files = snapshot.parent / PROJECT
    if not (files / LINEAGE).is_file():
        problem = "was registered before versions stored what they are made of"
        fix = "reproduce a later version; its tags are in `crescendo trace`"
        raise InputMissing("E-INP-160", version.uri, problem, fix)
    lineage = json.loads((files / LINEAGE).read_text(encoding="utf-8"))
    if not lineage["commit"]:
        fix = "reproduce a version that was promoted in a git repository"
        raise InputMissing("E-INP-161", version.uri, "does not say from which commit it was made", fix)
    runs = [*lineage["stages"], *lineage["evaluation"]]
    return Recipe(
        uri=version.uri,
        model=lineage["model"]["folder"],
        digest=lineage["model"]["digest"],
        commit=lineage["commit"],
        files=files,
        snapshot=snapshot,
        digests=_digests(version.uri, lineage),
        facts={run["stage"]: run.get("machine", {}) for run in runs},
        seconds={run["stage"]: (run["ended"] - run["started"]) / 1000 for run in runs if run["ended"]},
    )


def _digests(uri: str, lineage: Mapping[str, Any]) -> dict[str, str]:
    """{path: digest} of all that its stages read and made, but for reports, which a later run may replace."""
    digests: dict[str, str] = {}
    for path, digest in _known(lineage):
        if digests.setdefault(path, digest) != digest:
            problem = f"its stages used two different {path}, {digests[path][:12]} and {digest[:12]}"
            fix = "reproduce a version whose stages were run one after the other by `dvc repro`"
            raise BadData("E-DAT-160", uri, problem, fix)
    return digests


def _known(lineage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield lineage["model"]["folder"], lineage["model"]["digest"]
    if lineage["data"]["digest"]:
        yield PREPARED, lineage["data"]["digest"]
    for run in [*lineage["stages"], *lineage["evaluation"]]:
        yield from run["inputs"].items()
        yield from run["outputs"].items()
