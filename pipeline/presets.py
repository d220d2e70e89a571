"""Presets: files of values to write into params.yaml, whose comments are kept."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config.params import load_params, parse_params
from pipeline.config.strict_yaml import parse_yaml, read_yaml
from pipeline.errors import ConfigError


def presets(root: Path) -> dict[str, str]:
    """{name: first line of its comment} of the files in presets/."""
    paths = sorted((root / "presets").glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}


def apply_preset(root: Path, name: str) -> list[str]:
    """Write the values of presets/NAME.yaml into params.yaml, keeping comments; one line per changed value.

    Raises ConfigError if there is no such preset, or if the result would not be valid; nothing is written then.
    """
    known = presets(root)
    if name not in known:
        fix = f"choose one of: {', '.join(known) or 'none'}"
        raise ConfigError("E-CFG-017", "presets", f"there is no preset {name!r}", fix)
    changes = read_yaml(root / "presets" / f"{name}.yaml")
    lines = change_params(root, changes, f"params.yaml with presets/{name}.yaml")
    data = load_params(root / "params.yaml").data
    if data.source.startswith("torchvision:"):  # is downloaded there, and DVC expects the folder before
        (root / data.path).mkdir(parents=True, exist_ok=True)
    return lines


def change_params(root: Path, changes: Mapping[str, Any], what: str) -> list[str]:
    """Write values into params.yaml, keeping comments; one line per changed value.

    Raises ConfigError, which names `what`, if the result would not be valid; nothing is written then.
    """
    from ruamel.yaml import YAML

    read_yaml(root / "params.yaml")  # Raises where the file is missing or not YAML.
    yaml = YAML()
    yaml.width = 4096  # Folds no line.
    yaml.indent(mapping=2, sequence=4, offset=2)
    params = yaml.load((root / "params.yaml").read_text(encoding="utf-8"))
    lines = list(_merge(params, changes, ""))
    text = io.StringIO()
    yaml.dump(params, text)
    content = text.getvalue().encode()
    parse_params(parse_yaml(content, what), what)
    artifacts.write_atomic(root / "params.yaml", content)
    return lines


def _merge(into: Any, changes: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Set the leaves of `changes`, at any depth; yields `section.key: old -> new`."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), Mapping):
            yield from _merge(into[key], value, f"{prefix}{key}.")
        elif into.get(key) != value:
            yield f"{prefix}{key}: {_plain(into.get(key))} -> {_plain(value)}"
            into[key] = value


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, list) else str(value) or "''"
