"""Many prompts from a file, one PNG each: names of files, and the list beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import BadData

LIST = "prompts.jsonl"  # in the folder of the images: which is which
MAX_NAME = 120  # bytes of a prompt in the name of its file


class Wanted(NamedTuple):
    """An image that was asked for, and the name of its file."""

    prompt: str
    seed: int
    file: str


class Prompts(NamedTuple):
    """The prompts of a file, in order. repeated, empty: lines that add nothing."""

    prompts: tuple[str, ...]
    repeated: int
    empty: int


def read_prompts(path: Path) -> Prompts:
    """A prompt a line, UTF-8, without blanks around it. Raises BadData for a file of anything else, or of none."""
    fix = "write one prompt a line, as UTF-8"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise BadData("E-DAT-080", str(path), f"is not UTF-8 at byte {error.start}", fix) from None
    found = [line for line in lines if line]
    if not found:
        raise BadData("E-DAT-081", str(path), "holds no prompt", fix)
    unique = tuple(dict.fromkeys(found))
    return Prompts(unique, len(found) - len(unique), len(lines) - len(found))


def wanted(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Wanted]:
    """Every prompt with every seed; prompts that would have the same name of a file are numbered."""
    used: dict[str, int] = {}
    for prompt in prompts:
        name = _name_of(prompt)
        used[name.casefold()] = number = used.get(name.casefold(), 0) + 1
        stem = name if number == 1 else f"{name}~{number}"
        for seed in seeds:
            yield Wanted(prompt, seed, f"{stem}-{seed}.png")


def _name_of(prompt: str) -> str:
    """Letters, digits and single hyphens of a prompt."""
    plain = re.sub(r"[\W_]+", "-", prompt).strip("-").encode()[:MAX_NAME]
    return plain.decode(errors="ignore") or "prompt"


def as_list(images: Sequence[Wanted]) -> str:
    """The lines of LIST."""
    return "".join(json.dumps(image._asdict(), ensure_ascii=False) + "\n" for image in images)
