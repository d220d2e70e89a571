"""From a picture back to its making: the prompt and seed that it names, and the version that drew it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import BadData, InputMissing, one_line, reason
from pipeline.inference.png import PIXELS, read_png
from pipeline.registry.package import DIGEST_TAG, REGISTRY_URI, Registry, Version
from pipeline.registry.trace import Tree, branches, draw, trace
from pipeline.tracking import store

SIZE = ("width", "height")
DRAWN = ("passes", "steps", "guidance", "sampler", "guide", "factor", "strength", "resolution")
OPTIONS = ("guidance", "sampler", "guide", "resolution", "factor", "strength")  # of the command line, too
MAX_SHOWN = 2000  # characters of a fact


def trace_picture(root: Path, path: Path, name: str) -> dict[str, Any]:
    """What a PNG file says of how it was made, and what the registry knows of its model, as JSON values.

    name: the registered model to look for where the file names a folder.

    Raises:
        BadData: it is no PNG file, or is damaged.
        InputMissing: there is no such file, or it does not say how it was made.
    """
    if not os.path.isfile(path):
        fix = "name a PNG file, models:/NAME/3 or models:/NAME@champion"
        raise InputMissing("E-INP-074", str(path), "is no file, nor an address of the registry", fix)
    try:
        made, pixels = read_png(path.read_bytes())
    except OSError as error:
        if error.errno is not None:
            raise
        raise _no_png(path, error) from None
    except Exception as error:  # Pillow's parsers raise many kinds for damaged files.
        raise _no_png(path, error) from None
    if made is None:
        problem = (
            "does not say how it was made: crescendo did not make it, did before it wrote that, or another "
        )
        fix = "look for the file as it was made, or draw it again"
        raise InputMissing("E-INP-073", str(path), f"{problem}program dropped it", fix)
    version = find_version(root, made, name)
    return {
        "file": str(path),
        "made": made,
        "unchanged": made.get(PIXELS) == pixels,
        "again": shlex.join(command(made, version)),
        "version": None if version is None else trace(root, version.uri),
    }


def _no_png(path: Path, error: Exception) -> BadData:
    return BadData(
        "E-DAT-070", str(path), f"cannot be read as a PNG file: {reason(error)}", "name a PNG file"
    )


def find_version(root: Path, made: Mapping[str, Any], name: str) -> Version | None:
    """The version that a file names, or else the newest of the same snapshot; None if this registry has none."""
    address, digest = str(made.get("model")), str(made.get("digest"))
    if not re.fullmatch("[0-9a-f]{64}", digest) or not store.store_exists(root):
        return None
    match = REGISTRY_URI.fullmatch(address)
    if match is not None and re.fullmatch(r"[\w.-]+", match["name"]):
        name = match["name"]
    versions = Registry(root).versions(name, (DIGEST_TAG, digest))
    named = [version for version in versions if version.uri == address]
    return next(reversed(named or versions), None)


def command(made: Mapping[str, Any], version: Version | None) -> list[str]:
    """The command that makes these pixels again, with the model where it is now."""
    several = made.get("prompts")
    prompts = several if isinstance(several, list) else [made.get("prompt", "")]
    steps = made.get("passes", made.get("steps"))
    words = ["crescendo", *(["upscale", "IMAGE"] if "of" in made else ["generate"])]
    address = made.get("model") if version is None else version.uri
    words += ["--model", str(address)] if address else []
    words += ["--seed", str(made.get("seed"))] + ([] if steps is None else ["--steps", str(steps)])
    for key in OPTIONS:
        words += [f"--{key}", str(made[key])] if key in made else []
    if "of" in made:
        words += [] if made.get("project", True) else ["--no-project"]
        return [*words, *(f"--prompt={prompt}" for prompt in prompts)]
    size = "x".join(str(made.get(side)) for side in SIZE)
    return [*words, "--size", size, "--num", str(made.get("num", 1)), "--", *map(str, prompts)]


def draw_picture(facts: Mapping[str, Any]) -> list[str]:
    """The lines of `crescendo trace FILE`."""
    made, version = facts["made"], facts["version"]
    tree: Tree = {line: {} for line in _making(made)}
    unchanged = "as they were made" if facts["unchanged"] else "not those that were made: changed since"
    tree[f"pixels  {unchanged}"] = {}
    if isinstance(made.get("of"), dict):
        source = made["of"]
        before = source.get("made")
        below: Tree = {line: {} for line in _making(before)} if isinstance(before, dict) else {}
        tree[f"enlarged from  sha256 {_short(source.get('sha256'))}"] = below
    tree[f"again  {one_line(facts['again'])}"] = {}
    if version is None:
        tree["version  none in this registry has that snapshot"] = {}
    lines = [one_line(facts["file"]), *branches(tree)]
    return lines if version is None else lines + draw(version)


def _making(made: Mapping[str, Any]) -> Iterator[str]:
    """The facts of one file, a line each."""
    prompts = made.get("prompts")
    for prompt in prompts if isinstance(prompts, list) else [made.get("prompt", "")]:
        yield f"prompt  {_text(prompt) or '(none)'}"
    seed, num = made.get("seed"), made.get("num", 1)
    if isinstance(seed, int) and isinstance(num, int) and num > 1:
        yield f"seeds  {seed} to {seed + num - 1} of each prompt"
    else:
        yield f"seed  {_text(seed)}"
    sizes = (
        [f"{_text(made[SIZE[0]])}x{_text(made[SIZE[1]])} px"] if all(side in made for side in SIZE) else []
    )
    yield f"drawn with  {', '.join([*sizes, *(f'{key} {_text(made[key])}' for key in DRAWN if key in made)])}"
    yield f"model  {_text(made.get('model')) or 'unknown'}, snapshot {_short(made.get('digest'))}"


def _text(value: object) -> str:
    return one_line(value)[:MAX_SHOWN]


def _short(digest: object) -> str:
    return _text(digest)[:12]
