"""What has to stay: of the current parameters and code, of dvc.lock, and of registered versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.params import Params, load_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.launch.fingerprint import (
    INTERVALS,
    digest_path,
    entry_paths,
    is_code,
    read_stages,
    stage_identity,
)
from pipeline.launch.history import leaves
from pipeline.tracking.store import store_exists

LOCK = "dvc.lock"


@dataclass(frozen=True)
class Needs:
    """params: of the project. current: {stage: identity of a run, with no dependencies but code}. locked: {stage:
    its parameters in dvc.lock}. models: digests of registered ones."""

    params: Params
    current: Mapping[str, Mapping[str, Any]]
    locked: Mapping[str, Mapping[str, Any]]
    models: frozenset[str]

    def why(self, made_from: Mapping[str, Any]) -> str | None:
        """Why a run that was made from this is needed; None if it is not."""
        stage, params = str(made_from["stage"]), _flat(made_from["params"])
        current = self.current.get(stage)
        if current is not None and params == _flat(current["params"]):
            code = {path: digest for path, digest in made_from["deps"].items() if is_code(path)}
            if code == current["deps"] and made_from["format"] == current["format"]:
                return "of the current parameters"
        if stage in self.locked and params == _flat(self.locked[stage]):
            return f"of {LOCK}"
        return None


def find_needs(root: Path) -> Needs:
    """What the project at `root` needs. Raises PipelineError where a file or the registry cannot be read."""
    current = {}
    for stage, section in read_stages(root).items():
        code = filter(is_code, entry_paths(section.get("deps", [])))
        current[stage] = stage_identity(stage, root, {path: digest_path(root / path) for path in code})
    locked = (read_yaml(root / LOCK).get("stages") or {}) if (root / LOCK).exists() else {}
    params = {stage: entry.get("params", {}).get("params.yaml", {}) for stage, entry in locked.items()}
    return Needs(load_params(root / "params.yaml"), current, params, _registered(root))


def _registered(root: Path) -> frozenset[str]:
    if not store_exists(root):
        return frozenset()
    from pipeline.registry.package import Registry

    return Registry(root).digests()


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, as JSON has them, without how often something is logged or drawn."""
    plain = json.loads(json.dumps(params))
    return {key: value for key, value in leaves(plain) if not set(key.split(".")) & set(INTERVALS)}
