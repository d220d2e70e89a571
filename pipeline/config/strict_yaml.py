"""YAML files as frozen, strict models: unknown keys are refused, with a suggestion. The one reader of YAML."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config.renamed import REMOVED_KEYS, RENAMED_KEYS, RENAMED_VALUES
from pipeline.errors import ConfigError, InputMissing

_MAX_BYTES = 64 * 1024
_MAX_NODES = 10_000


class Section(BaseModel):
    """Base of all sections: frozen, strict (no text for numbers), finite, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def require(condition: bool, message: str) -> None:
    """Raise the ValueError of a validator: `key: problem`, or `key: problem. Fix: what to do`."""
    if not condition:
        raise ValueError(message)


_Model = TypeVar("_Model", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML 1.2 file, read as DVC reads it.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is too large, not YAML, or not keys and values.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        fix = "run inside a checkout of the project"
        raise InputMissing("E-INP-001", str(path), "is missing", fix) from None
    return parse_yaml(content, path.name)


def parse_yaml(content: bytes, source: str) -> dict[str, Any]:
    """`read_yaml` of a file's bytes; errors name `source`."""
    return copy.deepcopy(_parse(content, source))


@functools.lru_cache(maxsize=8)  # A stage reads params.yaml and dvc.yaml ten times, in 0.1 s each.
def _parse(content: bytes, source: str) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(content) > _MAX_BYTES:
        raise ConfigError("E-CFG-005", source, f"has {len(content)} bytes", f"keep it below {_MAX_BYTES}")
    try:
        tree = YAML(typ="safe").load(content.decode("utf-8"))
    except MarkedYAMLError as exc:
        line = f"line {exc.problem_mark.line + 1}: " if exc.problem_mark else ""
        problem = str(exc.problem or exc.context or "cannot be parsed").strip().split("\n")[0]
        raise ConfigError("E-CFG-005", source, f"{line}{problem}", "correct this line") from None
    except (YAMLError, RecursionError, ValueError) as exc:
        problem = f"is not YAML 1.2 in UTF-8 ({type(exc).__name__})"
        raise ConfigError("E-CFG-005", source, problem, "write plain keys and values") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("E-CFG-005", source, f"holds a {type(tree).__name__}", "write keys and values")
    return tree


def _freeze(value: Any, budget: list[int]) -> Any:
    """Lists as tuples, which strict models require; `budget` limits the values that YAML aliases may expand to."""
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"more than {_MAX_NODES} values")
    if isinstance(value, Mapping):
        return {key: _freeze(item, budget) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_freeze(item, budget) for item in value)
    return value


def parse_section(model: type[_Model], tree: Mapping[str, Any], source: str) -> _Model:
    """`tree` as a `model`. Raises ConfigError, which names `source` and the first wrong key."""
    try:
        frozen = _freeze(tree, [_MAX_NODES])
    except (ValueError, RecursionError) as exc:
        raise ConfigError("E-CFG-005", source, f"is too large ({exc})", "remove YAML aliases") from None
    try:
        return model.model_validate(frozen)
    except ValidationError as exc:
        # An unknown key is usually a misspelt one, which would be reported as missing, too.
        first = min(exc.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise _explain(model, dict(first), source) from None


def _explain(model: type[Section], error: dict[str, Any], source: str) -> ConfigError:
    location = tuple(error["loc"])
    key = _dotted(location)
    where = f"{source}: {key}" if key else source
    if key in RENAMED_KEYS:
        return ConfigError("E-CFG-001", where, "was renamed", f"write {RENAMED_KEYS[key]}")
    if key in REMOVED_KEYS:
        return ConfigError("E-CFG-001", where, "is gone", f"remove it, and set {REMOVED_KEYS[key]}")
    if new := RENAMED_VALUES.get(key, {}).get(str(error["input"])):
        return ConfigError("E-CFG-002", where, f"{error['input']!r} was renamed", f"write {new}")
    if error["type"] == "extra_forbidden":
        return ConfigError("E-CFG-001", where, "unknown key", _suggest(model, location))
    if error["type"] == "missing":
        return ConfigError("E-CFG-003", where, "missing key", "add it (git log -p shows its last value)")
    if error["type"] == "value_error":
        problem, _, fix = str(error["ctx"]["error"]).partition(". Fix: ")
        key, _, rest = problem.partition(": ")
        where = f"{source}: {_dotted((*location, key))}"
        return ConfigError("E-CFG-004", where, rest, fix or "change one of the two, or this value")
    message = str(error["msg"])
    message = message[:1].lower() + message[1:]
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ConfigError("E-CFG-002", where, f"{shown} is not valid", message)


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _suggest(model: type[Section], location: tuple[Any, ...]) -> str:
    """What the misspelt last key of `location` may have meant."""
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list, whose annotation names the model already
            continue
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [inner, *get_args(inner)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"remove it, or use one of: {', '.join(known)}"
