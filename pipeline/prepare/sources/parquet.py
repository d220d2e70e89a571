"""Images in Parquet files, one or a folder of them, as Hugging Face's `datasets` writes them, and similar.

The first column named like an image holds the files' bytes, plain or as {bytes, path}; the first named like a
caption holds a text, several, or a class. Capitals and blanks in names do not count. Listing reads captions only;
images are read a row group at a time.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import BadData, InputMissing
from pipeline.prepare import images
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.limits import MAX_BYTES, too_many_bytes
from pipeline.prepare.sources.files import File, PerProcess, damage, original, printable
from pipeline.prepare.sources.metadata import clean_captions, texts_of, unread_columns
from pipeline.prepare.sources.places import name_in, open_place
from pipeline.prepare.sources.source import Item, Listing
from pipeline.prepare.sources.tables import caption_column, column_name, like_captions
from pipeline.text.captions import plain_english

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
LABEL = "label"
MAX_GROUP = 4 * 2**30  # bytes of the images in a row group, which must fit in memory
_REPAIR = "fetch it again, or write it again"


class _Columns(NamedTuple):
    image: str
    caption: str | None
    label: str | None
    classes: tuple[str, ...]  # The names of label's values, if they are known.
    unread: tuple[str, ...]  # Columns of texts that may be captions.


def _columns(schema: Any, where: str) -> _Columns:
    """Which columns of an Arrow schema to read. Raises BadData E-PAR-002 if none holds images' bytes."""
    names = {column_name(name): name for name in reversed(schema.names)}
    image = next((names[name] for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        problem = f"has no column of images, but {', '.join(schema.names)[:200]}"
        raise BadData("E-PAR-002", where, problem, f"name it {IMAGE_COLUMNS[0]}")
    if not _holds_bytes(schema.field(image).type):
        problem = f"column {image!r} holds {str(schema.field(image).type)[:80]}, not the bytes of files"
        raise BadData("E-PAR-002", where, problem, "write each image as bytes, or as {bytes, path}")
    caption, label = names.get(caption_column(names)), names.get(LABEL)
    texts = [field.name for field in schema if _holds_texts(field.type) and field.name not in {image, label}]
    unread = like_captions(texts, {name for name in (caption, label) if name})
    return _Columns(image, caption, label, _classes(schema.metadata or {}), tuple(unread))


def _holds_texts(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _holds_texts(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _classes(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """The names of the classes that `datasets` notes in a schema, or none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][LABEL]["names"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return ()
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(map(plain_english, names)) if named else ()


def class_name(label: int, names: Sequence[str]) -> str:
    """The name of class `label`, `class N` where it has none, and nothing for -1: not labelled."""
    if 0 <= label < len(names) and names[label]:
        return names[label]
    return f"class {label}" if label >= 0 else ""


class Parquet:
    """The images in the file `root / path`, or in all .parquet files below that folder."""

    licence: str | None = None

    def __init__(self, root: Path, path: str, framing: Framing) -> None:
        """Raises InputMissing if there is neither."""
        self._place = open_place(root, path)
        self._framing = framing
        self.limits = framing.limits
        self._last: PerProcess[dict[str, _Reader]] = PerProcess()  # Of one file.
        if "://" not in path and not (root / path).exists():
            raise InputMissing(
                "E-INP-064", path, "is not there", "put a .parquet file, or a folder of them, there"
            )

    def listing(self) -> Listing:
        """All rows by file and number. Raises InputMissing if there is not a file, BadData for a bad one."""
        files = {file.name: file for file in self._place.files() if file.name.endswith(".parquet")}
        flaw = next((file.flaw for file in files.values() if file.flaw is not None), None)
        if flaw is not None:
            raise flaw
        notes: list[BadData] = []
        paths = self._place.paths(list(files))
        items = tuple(item for name, path in paths for item in self._items(files[name], path, notes))
        if not items:
            raise InputMissing(
                "E-INP-065", self._place.name, "holds no images", "put .parquet files with rows there"
            )
        return Listing(items, tuple(notes))

    def _items(self, file: File, path: Path, notes: list[BadData]) -> Iterator[Item]:
        name, row = name_in(self._place, file.name), 0
        with damage("E-PAR-001", name, _REPAIR), _open(path) as table:
            columns = _columns(table.schema_arrow, name)
            if columns.unread:
                used = [name for name in (columns.caption, columns.label) if name]
                notes.append(unread_columns(name, columns.unread, used[:1]))
            wanted = sorted({column for column in (columns.caption, columns.label) if column})
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                read = table.read_row_group(group, columns=wanted).to_pylist() if wanted else [{}] * count
                for cells in read:
                    yield _item(
                        f"{printable(file.name)}:{row}", f"{name}:{row}", file.version, cells, columns
                    )
                    row += 1

    def read(self, item: Item, limit: int = MAX_BYTES) -> bytes:
        """The bytes of one image. Raises BadData: E-IMG-001 there are none, E-IMG-002 too many."""
        name, _, row = item.id.rpartition(":")
        value = self._cell(original(name), int(row), item.where)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            path = value.get("path") if isinstance(value, dict) else None
            problem = f"names the file {str(path)[:200]!r} and holds no bytes" if path else "is empty"
            fix = "write the images' bytes into the file (embed_external_files), or remove this row"
            raise BadData("E-IMG-001", item.where, problem, fix)
        if len(content) > limit:
            raise too_many_bytes(item.where, len(content), limit)
        return bytes(content)

    def _cell(self, name: str, row: int, where: str) -> Any:
        last = self._last.get(dict)
        with damage("E-PAR-001", where, _REPAIR):
            if name not in last:
                last.clear()
                last[name] = _Reader(self._place.path(name), name_in(self._place, name))
            try:
                return last[name].cell(row)
            except OSError:
                last.clear()  # Its file may have been lost with a share.
                raise

    def decode(self, content: bytes, where: str) -> DecodedImage:
        """See `images.decode_square`."""
        return images.decode_square(content, where, self._framing)


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


class _Reader:
    """The column of images of one file, of which it keeps the row group last read."""

    def __init__(self, path: Path, where: str) -> None:
        self._where = where
        self._table = _open(path)
        self._about = self._table.metadata
        self._column = _columns(self._table.schema_arrow, where).image
        counts = (self._about.row_group(number).num_rows for number in range(self._about.num_row_groups))
        self._ends = list(accumulate(counts))
        self._kept: tuple[int, Any] = -1, None

    def cell(self, row: int) -> Any:
        """The value in one row."""
        group = bisect_right(self._ends, row)
        if group != self._kept[0]:
            self._kept = -1, None  # Two may be more than the memory holds.
            self._kept = group, self._read(group)
        return self._kept[1][row - self._ends[group]].as_py()  # Counted from the end of the group.

    def _read(self, group: int) -> Any:
        about = self._about.row_group(group)
        chunks = (about.column(number) for number in range(about.num_columns))
        ours = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == self._column)
        size = sum(chunk.total_uncompressed_size for chunk in ours)
        if size > MAX_GROUP:
            problem = f"has a row group of {size} bytes, the limit is {MAX_GROUP}"
            fix = "write it with smaller row groups (row_group_size=1000)"
            raise BadData("E-PAR-003", self._where, problem, fix)
        return self._table.read_row_group(group, columns=[self._column]).column(0)


def _item(name: str, where: str, version: str, cells: dict[str, Any], columns: _Columns) -> Item:
    captions: tuple[str, ...] = ()
    group, flaw = "", None
    try:
        label = cells.get(columns.label) if columns.label else None
        if isinstance(label, int | str):
            group = next(iter(_texts(cells, columns.label, columns.classes, where)), "")
        captions = _texts(cells, columns.caption, columns.classes, where)
    except BadData as exc:
        flaw = exc
    origin = f"column {columns.caption}" if captions else ""
    return Item(name, where, version, None, group, group, captions, flaw, origin)


def _texts(cells: dict[str, Any], column: str | None, classes: Sequence[str], where: str) -> tuple[str, ...]:
    value = cells.get(column) if column else None
    if column and column_name(column) == LABEL and type(value) is int:
        return clean_captions([class_name(value, classes)], where)
    texts = texts_of(value)
    if texts is None:
        problem = f"has a {column} that is not text ({type(value).__name__})"
        raise BadData("E-CAP-004", where, problem, "write a text, or a list of texts")
    return clean_captions(texts, where)
