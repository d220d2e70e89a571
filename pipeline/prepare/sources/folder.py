"""A user's own folder of images, at any depth, on a disk or behind a URL, with captions if there are any.

Sub-folders are also the groups that `data.subset` selects from. Where all top folders are splits
(`train`, `validation`, `test`), those below count. Hidden files and documents are passed over.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import BadData, InputMissing
from pipeline.prepare import images
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.images import MAX_BYTES
from pipeline.prepare.sources.captions import Captions
from pipeline.prepare.sources.files import File, Tree, original, printable
from pipeline.prepare.sources.local import LocalTree
from pipeline.prepare.sources.remote import RemoteTree
from pipeline.prepare.sources.source import Item, Listing

SPLITS = {"train", "validation", "val", "valid", "test"}
DOCUMENTS = {
    ".txt", ".caption", ".md", ".rst", ".html", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml",
    ".yml", ".toml", ".xml", ".license", ".cls", ".npz", ".ndjson", ".tag", ".tags", ".prompt", ".text",
}  # fmt: skip


def is_document(name: str) -> bool:
    """Whether a file is known, by its name, not to be an image."""
    return posixpath.splitext(name)[1].lower() in DOCUMENTS


def _folders(name: str) -> list[str]:
    return [part for part in posixpath.dirname(name).split("/") if part not in {"", ".."}]


def _has_splits(image_files: Sequence[File]) -> bool:
    """Whether all folders at the top are splits; `train` beside `plane` is a class."""
    tops = {folders[0] for file in image_files if file.flaw is None and (folders := _folders(file.name))}
    return bool(tops) and tops <= SPLITS


class TreeSource:
    """The images in a tree of files."""

    licence: str | None = None

    def __init__(self, tree: Tree, name: str, framing: Framing, captions: str) -> None:
        """`name` is the tree's, for messages; `captions` is `data.captions`."""
        self._tree = tree
        self._name = name.rstrip("/")
        self._framing = framing
        self._rule = captions

    def listing(self) -> Listing:
        """All images, in the tree's order.

        Raises InputMissing if there is none, BadData for a bad metadata file or a damaged archive.
        """
        files = self._tree.files()
        image_files = [file for file in files if not is_document(file.name)]
        if not image_files:
            raise InputMissing("E-INP-022", self._name, "holds no images", "put PNG or JPEG files there")
        documents = [file for file in files if is_document(file.name)]
        names = [file.name for file in image_files]
        captions = Captions(self._tree, self._name, names, documents, self._rule)
        skip = int(_has_splits(image_files))
        items = tuple(self._item(file, skip, captions) for file in image_files)
        flaws = [file.flaw for file in documents if file.flaw is not None]
        return Listing(items, (*flaws, *captions.notes()))

    def _item(self, file: File, skip: int, captions: Captions) -> Item:
        groups = list(map(printable, _folders(file.name)[skip:]))
        texts: tuple[str, ...] = ()
        flaw, origin = file.flaw, ""
        if flaw is None:
            try:
                texts, origin = captions.of(file.name, groups)
            except BadData as exc:
                flaw = exc
        return Item(
            id=printable(file.name),
            where=f"{self._name}/{printable(file.name)}",
            version=file.version,
            family=None,
            group=groups[0] if groups else "",
            subgroup="/".join(groups),
            captions=texts,
            flaw=flaw,
            origin=origin,
        )

    def read(self, item: Item, limit: int = MAX_BYTES) -> bytes:
        """The bytes of one image file. Raises BadData where it is not a plain file, damaged, or too large."""
        return self._tree.read(original(item.id), limit)

    def decode(self, content: bytes, where: str) -> DecodedImage:
        """See `images.decode_square`."""
        return images.decode_square(content, where, self._framing)


class Folder(TreeSource):
    """The images below `root / path`, or below the URL `path`."""

    def __init__(self, root: Path, path: str, framing: Framing, captions: str = "auto") -> None:
        """Raises InputMissing if there is no such folder."""
        if "://" not in path and not (root / path).is_dir():
            raise InputMissing("E-INP-021", path, "is not a folder", "make it and put images there")
        tree: Tree = RemoteTree(path) if "://" in path else LocalTree(root / path, path.rstrip("/"))
        super().__init__(tree, path, framing, captions)
