"""A user's own folder of images, at any depth, with captions beside them if there are any.

Captions of an image, the first that exists counts: lines of `metadata.jsonl` in its folder or one above
({"file_name": path relative to that file, "text": a text or a list of texts}); a `.txt` of the same name,
one caption a line; the name of the sub-folder it lies in. Sub-folders are also the groups that
`data.subset` selects from. Links are not followed; hidden files and documents are passed over.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.captions import MAX_CAPTION, normalise
from pipeline.data.images import MAX_BYTES, Pixels, decode, square
from pipeline.data.sources import Item, Listing
from pipeline.errors import BadData, InputMissing, one_line

METADATA = "metadata.jsonl"
DOCUMENTS = {".txt", ".md", ".rst", ".html", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".license"}
MAX_SIDECAR = 64 * 1024
MAX_METADATA = 256 * 2**20

_Captions = dict[str, tuple[str, ...]]


def _files_below(folder: Path) -> list[str]:
    """Names relative to `folder`, POSIX, sorted, of all that is not a folder and not hidden."""
    names = []
    for place, subfolders, files in os.walk(folder):
        links = [name for name in subfolders if Path(place, name).is_symlink()]
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in links]
        for name in files + links:
            if not name.startswith("."):
                names.append(Path(place, name).relative_to(folder).as_posix())
    return sorted(names, key=os.fsencode)


def _printable(name: str) -> str:
    """A file name as text that any file can hold: bytes that are not UTF-8, and controls, are escaped."""
    return one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))


def _clean(texts: Sequence[str], where: str) -> tuple[str, ...]:
    """Normalised captions without repeats and empty ones. Raises BadData where one is too long."""
    captions = tuple(dict.fromkeys(filter(None, map(normalise, texts))))
    for caption in captions:
        if len(caption) > MAX_CAPTION:
            problem = f"holds a caption of {len(caption)} characters, the most is {MAX_CAPTION}"
            raise BadData("E-CAP-003", where, problem, "shorten it")
    return captions


def _read_sidecar(path: Path, where: str) -> tuple[str, ...]:
    """Captions in a `.txt`, one a line. Raises BadData."""
    if path.is_symlink() or not path.is_file():
        raise BadData("E-CAP-001", where, "is not a plain file", "replace it by one")
    if path.stat().st_size > MAX_SIDECAR:
        problem = f"has {path.stat().st_size} bytes, the most is {MAX_SIDECAR}"
        raise BadData("E-CAP-003", where, problem, "shorten it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise BadData("E-CAP-002", where, f"is not UTF-8 (byte {exc.start})", "save it as UTF-8") from None
    return _clean(text.splitlines(), where)


def read_metadata(content: bytes, where: str) -> dict[str, list[str]]:
    """Texts of each file_name in a metadata.jsonl. Raises BadData E-CAP-004 naming the bad line."""
    fix = 'write {"file_name": "a.png", "text": "a caption"}'
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        at = f"{where} line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise BadData("E-CAP-004", at, "is not JSON in UTF-8", fix) from None
        name = row.get("file_name") if isinstance(row, dict) else None
        text = row.get("text", []) if isinstance(row, dict) else None
        listed: list[Any] = text if isinstance(text, list) else [text]
        if not isinstance(name, str) or not all(isinstance(one, str) for one in listed):
            raise BadData("E-CAP-004", at, "has no file_name, or a text that is no text", fix)
        texts.setdefault(name, []).extend(listed)
    return texts


class Folder:
    """Images below `root / path`, as squares of `resolution` px."""

    licence: str | None = None

    def __init__(self, root: Path, path: str, resolution: int, background: Sequence[int]) -> None:
        """Raises InputMissing if there is no such folder."""
        self._folder = root / path
        self._name = path
        self._resolution = resolution
        self._background = background
        if not self._folder.is_dir():
            raise InputMissing("E-INP-021", path, "is no folder", "make it and put images there")

    def listing(self) -> Listing:
        """All images by name. Raises InputMissing if there is none, BadData for a bad metadata.jsonl."""
        names = _files_below(self._folder)
        images = [name for name in names if Path(name).suffix.lower() not in DOCUMENTS]
        if not images:
            raise InputMissing("E-INP-022", self._name, "holds no images", "put PNG or JPEG files there")
        described, notes = self._metadata(names, set(images))
        return Listing(tuple(self._item(name, described) for name in images), tuple(notes))

    def _metadata(self, names: Sequence[str], images: set[str]) -> tuple[dict[str, list[str]], list[BadData]]:
        described: dict[str, list[str]] = {}
        notes = []
        # Deepest first, so that the nearest metadata.jsonl counts.
        files = [name for name in names if Path(name).name == METADATA]
        for name in sorted(files, key=lambda name: (-name.count("/"), name)):
            where, path = f"{self._name}/{_printable(name)}", self._folder / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_METADATA:
                problem = f"is no plain file of at most {MAX_METADATA} bytes"
                raise BadData("E-CAP-004", where, problem, "replace it, or split it over sub-folders")
            for file_name, texts in read_metadata(path.read_bytes(), where).items():
                target = os.path.normpath(os.path.join(os.path.dirname(name), file_name))
                if target in images:
                    described.setdefault(target, texts)
                else:
                    problem = f"describes {file_name!r}, which is not there"
                    notes.append(BadData("E-CAP-005", where, problem, "correct file_name"))
        return described, notes

    def _item(self, name: str, described: dict[str, list[str]]) -> Item:
        where = f"{self._name}/{_printable(name)}"
        folder = Path(name).parent.as_posix()
        parts = [] if folder == "." else [_printable(part) for part in folder.split("/")]
        captions: tuple[str, ...] = ()
        flaw = None
        try:
            captions = self._captions(name, parts, described)
        except BadData as exc:
            flaw = exc
        return Item(
            id=_printable(name),
            file=self._folder / name,
            where=where,
            base=None,
            group=parts[0] if parts else "",
            subgroup="/".join(parts),
            captions=captions,
            flaw=flaw,
        )

    def _captions(self, name: str, parts: list[str], described: dict[str, list[str]]) -> tuple[str, ...]:
        where = f"{self._name}/{_printable(name)}"
        if name in described:
            return _clean(described[name], where)
        sidecar = Path(name).with_suffix(".txt").as_posix()
        if os.path.lexists(self._folder / sidecar):
            return _read_sidecar(self._folder / sidecar, f"{self._name}/{_printable(sidecar)}")
        return _clean([parts[-1].replace("_", " ").replace("-", " ")] if parts else [], where)

    def load(self, item: Item) -> Pixels:
        """Decode, crop to the centred square and resample one image. Raises BadData."""
        status = os.lstat(item.file)
        if not stat.S_ISREG(status.st_mode):
            raise BadData("E-IMG-007", item.where, "is not a plain file", "replace it by one")
        if status.st_size > MAX_BYTES:
            problem = f"has {status.st_size} bytes, the most is {MAX_BYTES}"
            raise BadData("E-IMG-002", item.where, problem, "scale it down")
        return square(decode(item.file.read_bytes(), item.where, self._background), self._resolution)
