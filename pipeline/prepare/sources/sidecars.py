"""Captions in files beside images: `.txt`, else `.caption`, one a line; else a `.json` with one among its keys."""

from __future__ import annotations

import json
import posixpath
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from functools import partial

from pipeline.errors import BadData
from pipeline.prepare.photos import suffix_of
from pipeline.prepare.sources.files import File, Tree, Unread, folded, printable
from pipeline.prepare.sources.metadata import clean_captions, texts_of
from pipeline.prepare.sources.patience import Patience
from pipeline.prepare.sources.tables import caption_column, column_name, decode_text

SIDECARS = (".txt", ".caption", ".json")
MAX_SIDECAR = 64 * 1024
MAX_JSON = 2**20


def owners(images: Sequence[str], files: Sequence[File]) -> dict[str, list[str]]:
    """The images that each file lies beside, by its name: those with the same name but for the suffix (`a.txt` of
    `a.png`), or the whole one (`a.png.txt`). Case and ways to write accents are ignored where no name is the same
    without that."""
    stems = {file.name: posixpath.splitext(file.name)[0] for file in files}
    exact = _by_key(images, set(stems.values()), str)
    alike = _by_key(images, {folded(stem) for stem in stems.values() if stem not in exact}, folded)
    found = {name: exact.get(stem) or alike.get(folded(stem), []) for name, stem in stems.items()}
    return {name: images for name, images in found.items() if images}


def _by_key(images: Sequence[str], wanted: Set[str], fold: Callable[[str], str]) -> dict[str, list[str]]:
    """The images by those of their names, with and without suffix, that are `wanted` after `fold`."""
    found: dict[str, list[str]] = {}
    for image in images if wanted else ():
        for key in (fold(posixpath.splitext(image)[0]), fold(image)):
            if key in wanted:
                found.setdefault(key, []).append(image)
    return found


class Sidecars:
    """Files of captions beside the images of a tree."""

    def __init__(self, tree: Tree, where: str, images: Sequence[str], documents: Sequence[File]) -> None:
        """`where` is the tree's name, for messages."""
        self._tree, self._where = tree, where
        self._patience = Patience()
        files = [file for file in documents if suffix_of(file.name) in SIDECARS]
        beside = owners(images, files)
        self.names = set(beside)
        self.unread: list[str] = []  # JSON without a caption
        self._files: dict[str, list[File]] = defaultdict(list)
        for file in sorted(files, key=lambda file: SIDECARS.index(suffix_of(file.name))):
            for image in beside.get(file.name, []):
                self._files[image].append(file)

    def has(self, image: str) -> bool:
        """Whether an image has such a file, readable or not."""
        return image in self._files

    def of(self, image: str) -> tuple[tuple[str, ...], str] | None:
        """Captions and their origin, or None where there is no file of them. Raises BadData for a bad file."""
        for file in self._files.get(image, []):
            at = f"{self._where}/{printable(file.name)}"
            texts = self._read(file, at)
            if texts is not None:
                return clean_captions(texts, at), f"{suffix_of(file.name)} files"
            self.unread.append(file.name)
        return None

    def _read(self, file: File, at: str) -> list[str] | None:
        is_json = suffix_of(file.name) == ".json"
        limit = MAX_JSON if is_json else MAX_SIDECAR
        if file.flaw is not None:
            raise BadData("E-CAP-001", at, file.flaw.problem, file.flaw.fix)
        if file.size > limit:
            raise BadData("E-CAP-003", at, f"has {file.size} bytes, the limit is {limit}", "shorten it")
        content = b""
        try:
            content = self._patience.read(partial(self._tree.read, file.name, limit), at)
            text = decode_text(content)
        except Unread as exc:
            raise BadData("E-CAP-001", at, exc.problem, exc.fix) from None
        except UnicodeDecodeError as exc:
            line = content.count(10, 0, exc.start) + 1
            problem = f"is neither UTF-8 nor marked as UTF-16 (line {line}, byte {exc.start})"
            raise BadData("E-CAP-002", at, problem, "save it as UTF-8") from None
        return _json_texts(text, at) if is_json else text.splitlines()


def _json_texts(text: str, at: str) -> list[str] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadData("E-CAP-002", at, "is not JSON", "write it again, or remove it") from None
    if not isinstance(value, dict):
        return texts_of(value) if value is not None else None
    cells = {column_name(key): cell for key, cell in value.items()}
    column = caption_column(cells)
    return texts_of(cells[column]) if column else None
