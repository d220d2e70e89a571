"""A user's own folder of images, at any depth, on a disk or behind a URL, with captions if there are any.

Captions of an image, the first that exists counts:
    a row of `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in its folder or the nearest above, as
        imagefolder has them (file_name: path relative to that file; text, caption, prompt or label);
    a `.txt`, else a `.caption`, of the same name, one caption a line, as kohya's scripts have them;
    the name of the sub-folder it lies in, without kohya's number of repeats (`10_red cat`).
Sub-folders are also the groups that `data.subset` selects from. Where all top folders are splits
(`train`, `validation`, `test`), those below count. Hidden files and documents are passed over.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.errors import BadData, InputMissing
from pipeline.prepare import images
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.images import MAX_BYTES
from pipeline.prepare.sources.files import File, Tree, Unread, original, printable
from pipeline.prepare.sources.local import LocalTree
from pipeline.prepare.sources.metadata import Texts, clean_captions, read_metadata
from pipeline.prepare.sources.patience import Patience, away
from pipeline.prepare.sources.remote import RemoteTree
from pipeline.prepare.sources.source import Item, Listing

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
SPLITS = {"train", "validation", "val", "valid", "test"}
DOCUMENTS = {
    ".txt", ".caption", ".md", ".rst", ".html", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml",
    ".yml", ".toml", ".xml", ".license", ".cls", ".npz",
}  # fmt: skip
MAX_SIDECAR = 64 * 1024
MAX_METADATA = 256 * 2**20
_REPEATS = re.compile(r"\d+_(?=.)")


# Metadata files.


def _read_all_metadata(tree: Tree, where: str, files: Sequence[File]) -> tuple[Texts, list[BadData]]:
    """Texts of each file that metadata describe (the nearest count), and notes on those not there."""
    names = {file.name for file in files}
    described: Texts = {}
    notes = []
    metadata = [file for file in files if posixpath.basename(file.name) in METADATA]
    for file in sorted(metadata, key=_nearest_first):
        at = f"{where}/{printable(file.name)}"
        if file.flaw is not None or file.size > MAX_METADATA:
            problem = f"is not a plain file of at most {MAX_METADATA} bytes"
            raise BadData("E-CAP-004", at, problem, "replace it, or split it over sub-folders")
        try:
            content = Patience().read(partial(tree.read, file.name, MAX_METADATA), at)
        except Unread as exc:
            raise away(at, exc.problem) from None
        for file_name, texts in read_metadata(content, at).items():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(file.name), file_name))
            if target in names and not is_document(target):
                described.setdefault(target, texts)
            else:
                problem = f"describes {file_name[:200]!r}, which is not there"
                notes.append(BadData("E-CAP-005", at, problem, "correct file_name"))
    return described, notes


def _nearest_first(file: File) -> tuple[int, str, int]:
    folder, name = posixpath.split(file.name)
    return -file.name.count("/"), folder, METADATA.index(name)


# Files beside the images, and folders.


def is_document(name: str) -> bool:
    """Whether a file is known, by its name, not to be an image."""
    return posixpath.splitext(name)[1].lower() in DOCUMENTS


def _beside(name: str, suffix: str) -> str:
    return posixpath.splitext(name)[0] + suffix


def _read_sidecar(tree: Tree, file: File, where: str, patience: Patience) -> tuple[str, ...]:
    """Captions in a text file, one a line. Raises BadData."""
    at = f"{where}/{printable(file.name)}"
    if file.flaw is not None:
        raise BadData("E-CAP-001", at, file.flaw.problem, file.flaw.fix)
    if file.size > MAX_SIDECAR:
        raise BadData("E-CAP-003", at, f"has {file.size} bytes, the limit is {MAX_SIDECAR}", "shorten it")
    try:
        text = patience.read(partial(tree.read, file.name, MAX_SIDECAR), at).decode("utf-8-sig")
    except Unread as exc:
        raise BadData("E-CAP-001", at, exc.problem, exc.fix) from None
    except UnicodeDecodeError as exc:
        raise BadData("E-CAP-002", at, f"is not UTF-8 (byte {exc.start})", "save it as UTF-8") from None
    return clean_captions(text.splitlines(), at)


def _orphans(where: str, files: Sequence[File], image_files: Sequence[File]) -> list[BadData]:
    """Notes on text files that have no image beside them."""
    stems = {_beside(file.name, "") for file in image_files}
    texts = [file.name for file in files if posixpath.splitext(file.name)[1] in SIDECARS]
    problem, fix = "has no image of its name beside it", "rename it, or remove it"
    return [
        BadData("E-CAP-005", f"{where}/{printable(name)}", problem, fix)
        for name in texts
        if _beside(name, "") not in stems
    ]


def _folders(name: str) -> list[str]:
    return [part for part in posixpath.dirname(name).split("/") if part not in {"", ".."}]


def _has_splits(image_files: Sequence[File]) -> bool:
    """Whether all folders at the top are splits; `train` beside `plane` is a class."""
    tops = {folders[0] for file in image_files if file.flaw is None and (folders := _folders(file.name))}
    return bool(tops) and tops <= SPLITS


class TreeSource:
    """The images in a tree of files."""

    licence: str | None = None

    def __init__(self, tree: Tree, name: str, framing: Framing) -> None:
        """`name` is the tree's, for messages."""
        self._tree = tree
        self._name = name.rstrip("/")
        self._framing = framing
        self._patience = Patience()

    def listing(self) -> Listing:
        """All images, in the tree's order.

        Raises InputMissing if there is none, BadData for a bad metadata file or a damaged archive.
        """
        files = self._tree.files()
        image_files = [file for file in files if not is_document(file.name)]
        if not image_files:
            raise InputMissing("E-INP-022", self._name, "holds no images", "put PNG or JPEG files there")
        described, notes = _read_all_metadata(self._tree, self._name, files)
        flaws = [file.flaw for file in files if file.flaw is not None and is_document(file.name)]
        notes += flaws + _orphans(self._name, files, image_files)
        documents = {file.name: file for file in files if is_document(file.name)}
        skip = int(_has_splits(image_files))
        items = (self._item(file, skip, described.get(file.name), documents) for file in image_files)
        return Listing(tuple(items), tuple(notes))

    def _item(self, file: File, skip: int, texts: list[str] | None, documents: Mapping[str, File]) -> Item:
        groups = list(map(printable, _folders(file.name)[skip:]))
        where = f"{self._name}/{printable(file.name)}"
        captions: tuple[str, ...] = ()
        flaw = file.flaw
        if flaw is None:
            try:
                captions = self._captions(file.name, where, groups, texts, documents)
            except BadData as exc:
                flaw = exc
        return Item(
            id=printable(file.name),
            where=where,
            version=file.version,
            family=None,
            group=groups[0] if groups else "",
            subgroup="/".join(groups),
            captions=captions,
            flaw=flaw,
        )

    def _captions(
        self,
        name: str,
        where: str,
        groups: Sequence[str],
        texts: list[str] | None,
        documents: Mapping[str, File],
    ) -> tuple[str, ...]:
        if texts is not None:
            return clean_captions(texts, where)
        for sidecar in (_beside(name, suffix) for suffix in SIDECARS):
            if sidecar in documents:
                return _read_sidecar(self._tree, documents[sidecar], self._name, self._patience)
        label = _REPEATS.sub("", groups[-1], count=1) if groups else ""
        return clean_captions([label.replace("_", " ").replace("-", " ")], where)

    def read(self, item: Item, limit: int = MAX_BYTES) -> bytes:
        """The bytes of one image file. Raises BadData where it is not a plain file, damaged, or too large."""
        return self._tree.read(original(item.id), limit)

    def decode(self, content: bytes, where: str) -> DecodedImage:
        """See `images.decode_square`."""
        return images.decode_square(content, where, self._framing)


class Folder(TreeSource):
    """The images below `root / path`, or below the URL `path`."""

    def __init__(self, root: Path, path: str, framing: Framing) -> None:
        """Raises InputMissing if there is no such folder."""
        if "://" not in path and not (root / path).is_dir():
            raise InputMissing("E-INP-021", path, "is not a folder", "make it and put images there")
        tree: Tree = RemoteTree(path) if "://" in path else LocalTree(root / path, path.rstrip("/"))
        super().__init__(tree, path, framing)
