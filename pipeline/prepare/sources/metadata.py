"""Captions of images in metadata files: tables whose rows name a file and hold texts.

Files named `metadata` or `captions` must be of use, others (`train.csv`) are used if they are: their rows must name
images of the tree, and hold captions.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.errors import BadData
from pipeline.prepare.sources.files import File, Tree, Unread, listed, printable
from pipeline.prepare.sources.matching import Names
from pipeline.prepare.sources.patience import Patience, away
from pipeline.prepare.sources.tables import (
    FILE_COLUMNS,
    Row,
    caption_column,
    cut_captions,
    like_captions,
    names_files,
    rows_of,
)
from pipeline.text.captions import MAX_CAPTION, normalise

Texts = dict[str, list[str]]
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.tsv", "metadata.json")
SEPARATED = {".csv", ".tsv", ".txt"}
TABLES = {".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet"}
MAX_METADATA = 256 * 2**20
MAX_TABLES = 1000  # that are looked into although their names do not say that they are metadata
_FIX = "name one column file_name and one text"
_INSTEAD = "or set data.captions to sidecar, folder, filename or none"
_METADATA = re.compile(r"(?i)^meta|caption|metadata")


def clean_captions(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """Normalised captions without repeats and empty ones. Raises BadData E-CAP-003 where one is too long."""
    captions = tuple(dict.fromkeys(filter(None, map(normalise, texts))))
    for caption in captions:
        if len(caption) > MAX_CAPTION:
            problem = f"holds a caption of {len(caption)} characters, the limit is {MAX_CAPTION}"
            raise BadData("E-CAP-003", where, problem, "shorten it")
    return captions


@dataclass
class Table:
    """What a metadata file says: texts by file name, its columns and whether they hold words, those that the texts
    are from, and lines whose caption seems to be cut."""

    texts: Texts = field(default_factory=dict)
    columns: dict[str, bool] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
    cut: list[tuple[int, str]] = field(default_factory=list)

    def notes(self, at: str) -> Iterator[BadData]:
        """On what looks like captions and is not read. `at` is the file."""
        if others := like_captions((name for name, words in self.columns.items() if words), self.used):
            yield unread_columns(at, others, self.used)
        if self.cut:
            number, line = self.cut[0]
            problem = (
                f"has {len(self.cut)} lines whose caption may be cut, such as line {number}, {line[:80]!r}"
            )
            yield BadData("E-CAP-013", at, problem, "put texts with separators in quotes")


def unread_columns(at: str, others: Sequence[str], used: Collection[str]) -> BadData:
    """A note on columns of words that look like captions, beside those that are read."""
    problem = f"has columns that may be captions and are not read: {', '.join(others)[:200]}"
    read = f"{', '.join(used)} is read; " if used else ""
    return BadData("E-CAP-012", at, problem, f"{read}name the one with captions text")


def _has_words(cell: object) -> bool:
    return any(char.isalpha() for text in texts_of(cell) or () for char in text)


def _never(name: str) -> bool:
    return False


def read_table(content: bytes, where: str, is_image: Callable[[str], bool] = _never) -> Table:
    """A metadata file, whose suffix names its format.

    The files are named by the first of `FILE_COLUMNS` or, failing that, by a column that holds a name for which
    `is_image` holds. Raises BadData E-CAP-004 or 008, which names the bad line.
    """
    table = Table()
    found = ""  # the column that names files, where only its content tells
    for at, row in rows_of(content, where):
        for name, cell in row.items():
            table.columns[name] = table.columns.get(name, False) or _has_words(cell)
        column = _file_column(row) or found
        if not column:
            strings = ((key, cell) for key, cell in row.items() if isinstance(cell, str))
            found = column = next((key for key, cell in strings if is_image(cell)), "")
        name, texts, source = _described(row, column, at)
        table.texts.setdefault(name, []).extend(texts)
        if source:
            table.used[source] = None
    if posixpath.splitext(where)[1].lower() in SEPARATED:
        table.cut = cut_captions(content, where, table.used)
    return table


def read_metadata(content: bytes, where: str) -> Texts:
    """Texts of each file name in a metadata file. Raises as `read_table` does."""
    return read_table(content, where).texts


def _file_column(row: Row) -> str:
    named = sorted(filter(names_files, row), key=_rank)
    return next((column for column in named if isinstance(row[column], str) and row[column]), "")


def _rank(column: str) -> float:
    """`file_name` comes first, then `image_file_name` and its like, then the others."""
    return FILE_COLUMNS.index(column) if column in FILE_COLUMNS else 0.5


def _described(row: Row, name_column: str, at: str) -> tuple[str, list[str], str]:
    """File name, texts, and their column, of one row of metadata. Raises BadData E-CAP-004."""
    name = row.get(name_column)
    if not isinstance(name, str) or not name:
        problem = f"has no file_name, but {', '.join(row)[:200] or 'nothing'}"
        raise BadData("E-CAP-004", at, problem, _FIX)
    column = caption_column(row)
    texts = texts_of(row.get(column))
    if texts is None and column == "label" and type(row[column]) is int:
        texts = [f"class {row[column]}"]
    if texts is None:
        raise BadData("E-CAP-004", at, f"has a {column} that is not text", "write a text, or a list of texts")
    return name, texts, column


def texts_of(value: object) -> list[str] | None:
    """The texts in a cell: none, one, or a list of them; None where it holds anything else."""
    cells: Sequence[object] = [] if value is None else value if isinstance(value, list) else [value]
    texts = [text for text in cells if isinstance(text, str)]
    return texts if len(texts) == len(cells) else None


# In a tree.


def is_metadata(name: str) -> bool:
    """Whether a file's name says that it is metadata."""
    return bool(_METADATA.search(posixpath.splitext(posixpath.basename(name))[0]))


class Described:
    """What the tables in a tree say of its images."""

    def __init__(self, tree: Tree, where: str, images: Sequence[str], documents: Sequence[File]) -> None:
        """Read all tables among `documents`, the nearest first. `where` is the tree's name.

        Raises BadData E-CAP-004 and 007 to 009 for metadata that are of no use, Busy where they cannot be read.
        """
        self.texts: dict[str, tuple[list[str], str]] = {}  # and their origin, by image
        self.names: set[str] = set()  # of the tables that count
        self.notes: list[BadData] = []
        self._tree, self._where, self._images = tree, where, images
        self._by_folder: dict[str, Names] = {}
        left = MAX_TABLES
        for file in sorted(filter(_may_be_table, documents), key=_nearest_first):
            certain = is_metadata(file.name)
            left -= not certain
            if certain or left >= 0:
                self._add(file, certain)
        if left < 0:
            problem = f"has {-left} tables more than the {MAX_TABLES} that are looked into"
            self.notes.append(BadData("E-CAP-006", where, problem, "name those with captions metadata"))

    def _add(self, file: File, certain: bool) -> None:
        """Use a table, or note why not; raise that if it certainly is metadata."""
        at = f"{self._where}/{printable(file.name)}"
        folder = posixpath.dirname(file.name)
        alone = not any(image.startswith(f"{folder}/") for image in self._images)
        of_coco = posixpath.basename(folder) == "annotations" and alone  # beside the folders of images
        if of_coco:
            folder = posixpath.dirname(folder)
        names = self._by_folder.setdefault(folder, Names(folder, self._images))
        try:
            table = self._read(file, at, names)
            found, left_out = names.match(table.texts)
            certain &= bool(found) or not of_coco  # it may be of another part: train2017 beside val2017
            if not certain and not of_coco and not (found and table.used):
                return
            _check(table, found, names, at)
        except BadData as exc:
            if certain:
                raise
            if not file.name.endswith("_stats.json"):  # of img2dataset
                self.notes.append(BadData("E-CAP-006", at, f"is not read: {exc.problem}", exc.fix))
            return
        self.names.add(file.name)
        self.notes += table.notes(at)
        ways = f"; {left_out} of its names left out" if left_out else ""
        origin = f"{printable(file.name)} (column {', '.join(table.used)}{ways})"
        twice = 0
        for name, texts in table.texts.items():
            for image in found.get(name, []):
                twice += image in self.texts
                self.texts.setdefault(image, (texts, origin))
            if name not in found:
                problem = f"describes {name[:200]!r}, which is not there"
                self.notes.append(BadData("E-CAP-005", at, problem, "correct file_name"))
        if twice:
            problem = (
                f"describes {twice} images that a table before it describes, too, and is not used for them"
            )
            self.notes.append(BadData("E-CAP-010", at, problem, "keep one of the two"))

    def _read(self, file: File, at: str, names: Names) -> Table:
        if file.flaw is not None or file.size > MAX_METADATA:
            problem = f"is not a plain file of at most {MAX_METADATA} bytes"
            raise BadData("E-CAP-004", at, problem, "replace it, or split it over sub-folders")
        try:
            content = Patience().read(partial(self._tree.read, file.name, MAX_METADATA), at)
        except Unread as exc:
            raise away(at, exc.problem) from None
        return read_table(content, at, names.is_image)


def _may_be_table(file: File) -> bool:
    suffix = posixpath.splitext(file.name)[1].lower()
    return suffix in TABLES or (suffix == ".txt" and is_metadata(file.name))


def _nearest_first(file: File) -> tuple[int, str, int, str]:
    folder, name = posixpath.split(file.name)
    rank = METADATA.index(name.lower()) if name.lower() in METADATA else len(METADATA)
    return -file.name.count("/"), folder, rank, name


def _check(table: Table, found: Collection[str], names: Names, at: str) -> None:
    """Raise BadData where a table names no image, or holds no captions."""
    if not found:
        few = listed([repr(name[:80]) for name in table.texts], 3)
        problem = f"names no image that is here, but {few}" if table.texts else "holds no rows"
        raise BadData(
            "E-CAP-007", at, problem, f"correct its names, which are relative to its folder, {_INSTEAD}"
        )
    if not table.used:
        problem = f"has no column of captions, but {', '.join(table.columns)[:200]}"
        raise BadData("E-CAP-009", at, problem, f"name the one with captions text, {_INSTEAD}")
    for name in found:
        for line in (line for text in table.texts[name] for line in text.splitlines()[1:]):
            if names.is_image(re.split(r"[,;\t|]", line)[0].strip()):
                problem = f"has a quote that is not closed: the caption of {name[:80]!r} holds another row"
                raise BadData("E-CAP-004", at, problem, "close it, or double the quotes inside a text")
