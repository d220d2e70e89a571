"""A user's own folder of images, at any depth, on a disk or behind a URL, with captions if there are any.

Sub-folders are also the groups that `data.subset` selects from. Where all top folders are splits
(`train`, `validation`, `test`), those below count. Hidden files and documents are passed over.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import BadData, InputMissing
from pipeline.prepare import images, photos
from pipeline.prepare.disk_list import DiskList
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.limits import MAX_BYTES
from pipeline.prepare.sources.captions import Captions
from pipeline.prepare.sources.files import File, Tree, listed, original, printable
from pipeline.prepare.sources.links import link_roots
from pipeline.prepare.sources.local import LocalTree
from pipeline.prepare.sources.remote import RemoteTree
from pipeline.prepare.sources.source import Item, Listing

SPLITS = {"train", "validation", "val", "valid", "test"}
DOCUMENTS = {
    ".txt", ".caption", ".md", ".rst", ".html", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml",
    ".yml", ".toml", ".xml", ".license", ".cls", ".npz", ".ndjson", ".tag", ".tags", ".prompt", ".text",
}  # fmt: skip


OTHERS = {
    ".doc", ".docx", ".odt", ".rtf", ".pdf", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".ini", ".db", ".lnk",
    ".url", ".log", ".py", ".sh", ".ipynb", ".css", ".js", ".htm", ".srt", ".pkl", ".npy", ".pt", ".safetensors",
    ".h5", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".3gp", ".mp3", ".wav", ".m4a", ".aac", ".ogg", ".aae",
    ".xmp",
}  # fmt: skip
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".7z", ".rar", ".zst"}
_NO_IMAGES = DOCUMENTS | OTHERS | ARCHIVES


def is_document(name: str) -> bool:
    """Whether a file is known, by its name, not to be an image."""
    return photos.suffix_of(name) in _NO_IMAGES


def _archives(where: str, documents: Sequence[File]) -> list[BadData]:
    """A note on archives among the files, which are not opened."""
    names = [printable(file.name) for file in documents if photos.suffix_of(file.name) in ARCHIVES]
    if not names:
        return []
    problem = f"holds {len(names)} archives, which are not opened: {listed(names, 3)}"
    fix = "unpack them, or prepare them alone with data.source: archive"
    return [BadData("E-ARC-019", where, problem, fix)]


def _folders(name: str, shards: bool) -> list[str]:
    """The folders that a file lies in. Of shards, the first is the archive, which is none."""
    return [part for part in posixpath.dirname(name).split("/") if part not in {"", ".."}][int(shards) :]


def _has_splits(folders: Iterable[list[str]]) -> bool:
    """Whether all folders at the top are splits; `train` beside `plane` is a class."""
    tops = {names[0] for names in folders if names}
    return bool(tops) and tops <= SPLITS


class TreeSource:
    """The images in a tree of files."""

    licence: str | None = None

    def __init__(self, tree: Tree, name: str, framing: Framing, captions: str, shards: bool = False) -> None:
        """`name` is the tree's, for messages; `captions` is `data.captions`; `shards`: its folders are archives."""
        self._shards = shards
        self._tree = tree
        self._name = name.rstrip("/")
        self._framing = framing
        self.limits = framing.limits
        self._rule = captions

    def listing(self) -> Listing:
        """All images, in the tree's order.

        Raises InputMissing if there is none, BadData for a bad metadata file or a damaged archive.
        """
        files = self._tree.files()
        image_files: list[File] = []
        documents: list[File] = []
        for file in files:
            (documents if is_document(file.name) else image_files).append(file)
        raw_twins = photos.raw_twins(file.name for file in image_files)
        image_files = [file for file in image_files if file.name not in raw_twins]
        if not image_files:
            packed = sum(photos.suffix_of(file.name) in ARCHIVES for file in files)
            problem = f"holds no images, but {packed} archives" if packed else "holds no images"
            fix = "write data.source: archive" if packed else "put PNG or JPEG files there"
            raise InputMissing("E-INP-022", self._name, problem, fix)
        names = [file.name for file in image_files]
        captions = Captions(self._tree, self._name, names, documents, self._rule)
        sound = (file.name for file in image_files if file.flaw is None)
        skip = int(_has_splits(_folders(name, self._shards) for name in sound))
        items = DiskList(self._item(file, skip, captions) for file in image_files)
        flaws = [file.flaw for file in documents if file.flaw is not None]
        notes = (*flaws, *captions.notes(), *_archives(self._name, documents))
        used = captions.used
        unused = Counter(photos.suffix_of(file.name) for file in documents if file.name not in used)
        twins = Counter(f"{photos.suffix_of(name)} beside its picture" for name in raw_twins)
        return Listing(items, notes, dict(sorted((unused + twins + self._tree.ignored).items())))

    def _item(self, file: File, skip: int, captions: Captions) -> Item:
        groups = list(map(printable, _folders(file.name, self._shards)[skip:]))
        texts: tuple[str, ...] = ()
        flaw, origin = file.flaw, ""
        where = f"{self._name}/{printable(file.name)}"
        if flaw is None and photos.is_raw_name(file.name):
            flaw = photos.raw_file(where, photos.suffix_of(file.name))
        if flaw is None:
            try:
                texts, origin = captions.of(file.name, groups)
            except BadData as exc:
                flaw = exc
        return Item(
            id=printable(file.name),
            where=where,
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

    def __init__(
        self, root: Path, path: str, framing: Framing, captions: str = "auto", roots: Sequence[str] = ()
    ) -> None:
        """`roots` is `data.link_roots`. Raises InputMissing if there is no such folder."""
        if "://" not in path and not (root / path).is_dir():
            raise InputMissing(
                "E-INP-021", path, "is not a folder", "write path: data/raw, and put images there"
            )
        tree: Tree = (
            RemoteTree(path)
            if "://" in path
            else LocalTree(root / path, path.rstrip("/"), link_roots(root, roots))
        )
        super().__init__(tree, path, framing, captions)
