"""Requests to a registered model: prompts and params of whatever types in, PNG files out, or one line.

Packed into registered models, whose `served.py` passes on what MLflow received. Needs neither mlflow nor
params.yaml.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from pipeline.errors import ConfigError
from pipeline.inference.generator import Generator, check_count, check_guidance
from pipeline.inference.png import encode_png

KINDS: dict[str, type] = {
    "seed": Integral,
    "steps": Integral,
    "guidance": Real,
    "width": Integral,
    "height": Integral,
    "n": Integral,
    "resolution": Integral,
}  # of params, in the order of the signature (`packaging.defaults`)
PROMPT = "prompt"  # the column
FORMATS = ("inputs", "instances", "dataframe_records", "dataframe_split")  # of MLflow
EXAMPLE = '{"inputs": {"prompt": ["red heart"]}, "params": {"seed": 3}}'
MAX_IMAGES = 4096  # of a call, which holds them in memory
TOGETHER = 64  # images that are made in one go


def check_request(tree: Any) -> None:
    """Raise ConfigError for prompts or params of a wrong type in the JSON that MLflow's server or command line
    received: it would draw a number as its digits, and `null` as a word."""
    if isinstance(tree, Mapping):
        check_prompts(list(prompts_of(tree)))
        bare = not any(key in tree for key in FORMATS)
        check_params({key: tree[key] for key in tree if key in KINDS} if bare else tree.get("params"))


def prompts_of(request: Mapping[str, Any]) -> Iterator[Any]:
    """The prompts of a request in any of FORMATS, or of none; what else it is, is MLflow's to say."""
    given = [request[key] for key in FORMATS if key in request]
    content = given[0] if given else request
    if "dataframe_split" in request and isinstance(content, Mapping):
        columns, rows = content.get("columns"), content.get("data")
        if isinstance(columns, list) and PROMPT in columns and isinstance(rows, list):
            place = columns.index(PROMPT)
            yield from (row[place] for row in rows if isinstance(row, list) and len(row) > place)
    elif isinstance(content, Mapping):
        prompts = content.get(PROMPT, [])
        yield from prompts if isinstance(prompts, list) else [prompts]
    elif isinstance(content, list):
        yield from (each.get(PROMPT, "") if isinstance(each, Mapping) else each for each in content)


def check_prompts(prompts: Sequence[Any]) -> None:
    """Raise ConfigError unless all are text."""
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            fix = 'write text; "" for no caption'
            raise ConfigError("E-CFG-071", PROMPT, f"{str(prompt)[:60]} in row {row} is no text", fix)


def check_params(params: Any) -> None:
    """Raise ConfigError for params of unknown names or wrong types. None, of one or all, is the model's own."""
    if params is None:
        return
    if not isinstance(params, Mapping):
        problem = f"{str(params)[:60]!r} is no object"
        raise ConfigError("E-CFG-190", "params", problem, 'write them as in {"seed": 3}')
    for name, value in params.items():
        if name not in KINDS:
            near = difflib.get_close_matches(str(name), KINDS, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(KINDS)}"
            raise ConfigError("E-CFG-191", "params", f"{str(name)[:60]!r} is unknown", fix)
        if value is not None and (isinstance(value, bool) or not isinstance(value, KINDS[name])):
            kind = "whole number" if KINDS[name] is Integral else "number"
            raise ConfigError("E-CFG-190", name, f"{str(value)[:60]!r} is no {kind}", f"write a {kind}")


def draw(generator: Generator, prompts: Sequence[Any], params: Mapping[str, Any]) -> list[bytes]:
    """n PNG files of each prompt, of seeds `seed`, `seed` + 1, ... Raises ConfigError for what cannot be drawn."""
    check_prompts(prompts)
    n, first = params.get("n", 1), params.get("seed", 0)
    if n < 1 or n * len(prompts) > MAX_IMAGES:
        problem = f"{n} makes {n * len(prompts)} images"
        raise ConfigError("E-CFG-072", "n", problem, f"choose 1 to {MAX_IMAGES} in all")
    options = options_of(generator, params)
    made = generator.made(**options)
    wanted = [(prompt, first + i) for prompt in prompts for i in range(n)]
    files = []
    for start in range(0, len(wanted), TOGETHER):
        part = wanted[start : start + TOGETHER]
        images = generator.images([prompt for prompt, _ in part], [seed for _, seed in part], **options)
        for (prompt, seed), image in zip(part, images, strict=True):
            files.append(encode_png(image, made | {"prompt": prompt, "seed": seed}))
    return files


def options_of(generator: Generator, params: Mapping[str, Any]) -> dict[str, Any]:
    """Params as options of `Generator.images`. 0, and what is not there, is the model's own."""
    config = generator.snapshot.config
    guidance, resolution = params.get("guidance"), params.get("resolution") or None
    check_guidance(guidance)
    if config.is_refined and guidance not in (None, config.sampling.guidance):
        problem = f"{guidance:g} would have no effect: a refined model has it built in"
        raise ConfigError("E-CFG-070", "guidance", problem, "leave it out")
    side = config.resolution
    size = params.get("width") or side, params.get("height") or side
    return {
        "num_steps": check_count(params.get("steps") or None),
        "guidance": None if config.is_refined else guidance,
        "resolution": resolution,
        "size": None if size == (side, side) else size,
    }
