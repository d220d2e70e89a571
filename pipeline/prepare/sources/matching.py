"""Which images of a tree the names in a metadata file mean."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.prepare.sources.files import folded


def _slashes(name: str) -> str:
    return posixpath.normpath(name.strip().replace("\\", "/"))


def _folded(name: str) -> str:
    return folded(_slashes(name))


def _stem(name: str) -> str:
    return posixpath.splitext(_folded(name))[0]


def _base(name: str) -> str:
    return posixpath.basename(_folded(name))


def _base_stem(name: str) -> str:
    return posixpath.splitext(_base(name))[0]


class _Way(NamedTuple):
    """How names and images are compared: by `of_name` and `of_image`, which leave something out."""

    of_name: Callable[[str], str]
    of_image: Callable[[str], str]
    left_out: str = ""
    unique: bool = True  # It counts only where no two names and no two images are equal then.


_EXACT = _Way(posixpath.normpath, str, unique=False)
_WAYS = (
    _EXACT,
    _Way(_slashes, str, unique=False),
    _Way(_folded, _folded, "case"),
    _Way(_folded, _stem, "suffixes", unique=False),
    _Way(_stem, _stem, "suffixes"),
    _Way(_base, _base, "folders"),
    _Way(_base, _base_stem, "folders and suffixes"),
    _Way(_base_stem, _base_stem, "folders and suffixes"),
)


class Names:
    """The images of a tree, by the names that a metadata file in one of its folders may give them."""

    def __init__(self, folder: str, images: Iterable[str]) -> None:
        """`folder` is that of the file, relative or ""; `images` are all of the tree."""
        self._folder = folder
        self._images = list(images)
        self._tables: dict[_Way, dict[str, list[str]]] = {}

    def _table(self, way: _Way) -> dict[str, list[str]]:
        if way not in self._tables:
            below = f"{self._folder}/" if way.left_out.startswith("folders") and self._folder else ""
            table: dict[str, list[str]] = defaultdict(list)
            for image in self._images:
                if image.startswith(below):
                    table[way.of_image(image)].append(image)
            self._tables[way] = dict(table)
        return self._tables[way]

    def _key(self, way: _Way, name: str) -> str:
        whole = name if way.left_out.startswith("folders") else posixpath.join(self._folder, name)
        return way.of_name(whole)

    def is_image(self, name: str) -> bool:
        """Whether `name`, which has a suffix, is that of an image."""
        ways = (way for way in _WAYS if "suffixes" not in way.left_out)
        return any(self._key(way, name) in self._table(way) for way in ways)

    def match(self, names: Iterable[str]) -> tuple[dict[str, list[str]], str]:
        """The images of each name that means any, and what had to be left out of the names: the strictest way by
        which one of them means an image holds for all."""
        listed = list(names)
        for way in _WAYS:
            found = {name: self._table(way).get(self._key(way, name), []) for name in listed}
            found = {name: images for name, images in found.items() if images}
            flat = [image for images in found.values() for image in images]
            if found and not (way.unique and (len(set(flat)) < len(flat) or len(flat) > len(found))):
                return found, way.left_out
        return {}, ""
