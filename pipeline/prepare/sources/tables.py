"""Rows of tables that describe images: JSON lines, JSON (also COCO's), CSV and its kin, Parquet.

Text is UTF-8 or, with its byte order mark, UTF-16; nothing else is guessed. Names of columns come in lower case and
with underscores, so that `File Name` is `file_name`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import BadData
from pipeline.prepare.sources.files import damage

# The first that a row has counts.
CAPTION_COLUMNS = (
    "text", "caption", "captions", "prompt", "label", "description", "descriptions", "prompts", "texts", "sentence",
    "sentences", "txt", "alt_text", "tags", "title",
)  # fmt: skip
FILE_COLUMNS = (
    "file_name", "filename", "file", "image", "image_file", "image_path", "image_name", "img", "img_path", "path",
    "filepath", "file_path", "key",
)  # fmt: skip
_LIKE_CAPTIONS = re.compile("caption|text|prompt|descri|sentence|title|tags|^alt")
SEPARATORS = ",;\t|"
_FIX_LINES = 'write {"file_name": "a.png", "text": "a caption"}'
_FIX_JSON = (
    'write a list of {"file_name": "a.png", "text": "a caption"}, or {"a.png": {"caption": "a caption"}}'
)
_FIX_COCO = "give it `images` with id and file_name, and `annotations` with image_id and caption"
_FIX_QUOTES = 'close each quote, and double those inside of a text: "a 5"" nail"'
Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]  # where it is, for messages; cells by column


def column_name(name: object) -> str:
    """`File Name ` as `file_name`."""
    return str(name).strip().casefold().replace(" ", "_").replace("-", "_")


def caption_column(columns: Iterable[str]) -> str:
    """The column that holds captions, by its name; empty where there is none."""
    known = set(columns)
    return next((column for column in CAPTION_COLUMNS if column in known), "")


def like_captions(columns: Iterable[str], used: Collection[str]) -> list[str]:
    """Columns of texts that look like captions by their names, and are not `used`; where none is, all."""
    others = [name for name in columns if name not in used and not names_files(column_name(name))]
    return [name for name in others if not used or _LIKE_CAPTIONS.search(column_name(name))]


def names_files(column: str) -> bool:
    """Whether a column holds names of image files, by its own name."""
    return column in FILE_COLUMNS or column.endswith("_file_name")


def decode_text(content: bytes) -> str:
    """UTF-8, or UTF-16 with its byte order mark. Raises UnicodeDecodeError, also for UTF-16 without the mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if 4 * content.count(0) > len(content):
        raise UnicodeDecodeError("utf-8", content, content.index(0), content.index(0) + 1, "NUL bytes")
    return content.decode("utf-8-sig")


def rows_of(content: bytes, where: str) -> Rows:
    """The rows of a table, whose suffix names its format. Raises BadData E-CAP-004, which names the bad line."""
    readers: dict[str, Callable[[bytes, str], Rows]] = {
        ".jsonl": _line_rows, ".ndjson": _line_rows, ".json": _json_rows, ".parquet": _parquet_rows,
    }  # fmt: skip
    return readers.get(posixpath.splitext(where)[1].lower(), _separated_rows)(content, where)


def _decoded(content: bytes, where: str) -> str:
    try:
        return decode_text(content)
    except UnicodeDecodeError as exc:
        at = f"{where} line {content.count(10, 0, exc.start) + 1}"
        fix = "save it as UTF-8 (in Excel: CSV UTF-8)"
        raise BadData("E-CAP-004", at, "is neither UTF-8 nor marked as UTF-16", fix) from None


def _json(text: str, at: str, fix: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadData("E-CAP-004", at, "is not JSON", fix) from None


def _object(value: object, at: str, fix: str) -> Row:
    if not isinstance(value, dict):
        raise BadData("E-CAP-004", at, "is not a JSON object", fix)
    return {column_name(key): cell for key, cell in value.items()}


def _line_rows(content: bytes, where: str) -> Rows:
    text = _decoded(content, where)
    if text.lstrip().startswith("["):
        yield from _json_rows(content, where)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            at = f"{where} line {number}"
            yield at, _object(_json(line, at, _FIX_LINES), at, _FIX_LINES)


def _json_rows(content: bytes, where: str) -> Rows:
    """A list of objects; COCO's captions; an object of objects or texts by file, as kohya's scripts write it; or
    JSON lines."""
    text = _decoded(content, where)
    first = text.strip().partition("\n")[0].strip()
    if first.startswith("{") and first.endswith("}") and "\n" in text.strip():
        yield from _line_rows(content, where)
        return
    tree = _json(text, where, _FIX_JSON)
    if isinstance(tree, list):
        for number, row in enumerate(tree, start=1):
            yield f"{where} row {number}", _object(row, f"{where} row {number}", _FIX_JSON)
    elif isinstance(tree, dict) and all(
        isinstance(tree.get(name), list) for name in ("images", "annotations")
    ):
        yield from _coco_rows(tree, where)
    elif isinstance(tree, dict) and tree and all(isinstance(cell, dict | str) for cell in tree.values()):
        for name, cell in tree.items():
            about = _object(cell, where, _FIX_JSON) if isinstance(cell, dict) else {"text": cell}
            yield f"{where} key {name[:80]!r}", {**about, "file_name": name}
    else:
        problem = "is neither a list of objects nor an object by file name"
        if isinstance(tree, dict) and tree:
            problem += f", but has the keys {', '.join(map(str, tree))[:200]}"
        raise BadData("E-CAP-004", where, problem, _FIX_JSON)


def _coco_rows(tree: Mapping[str, Any], where: str) -> Rows:
    """One row for each of COCO's annotations, which name an image by its number."""
    images = [
        _object(image, f"{where} image {number}", _FIX_COCO)
        for number, image in enumerate(tree["images"], start=1)
    ]
    names = {str(image.get("id")): image.get("file_name") for image in images}
    for number, annotation in enumerate(tree["annotations"], start=1):
        at = f"{where} annotation {number}"
        row = _object(annotation, at, _FIX_COCO)
        image = str(row.get("image_id"))
        if image not in names:
            raise BadData("E-CAP-004", at, f"is of image {image[:80]}, which `images` lacks", _FIX_COCO)
        others = {key: cell for key, cell in row.items() if key not in {"id", "image_id"}}
        yield at, {**others, "file_name": names[image]}


def cut_captions(content: bytes, where: str, columns: Collection[str]) -> list[tuple[int, str]]:
    """Lines of a table with separators, without quotes, in which the caption, in one of `columns`, seems to go on
    in the next field: that begins with a blank, or has no name in the header. Number and line of each."""
    lines = _decoded(content, where).splitlines()
    header = next((line for line in lines if line.strip()), "")
    separator = _separator(header.strip(), where)
    titles = header.split(separator)
    names = [column_name(title.strip('"')) for title in titles]
    place = next((i for i, name in enumerate(names) if name in columns), len(names))
    spaced = any(title.startswith(" ") for title in titles[1:])

    def cut(line: str) -> bool:
        cells = line.split(separator)
        if '"' in line or len(cells) != len(names) or line is header:
            return False
        before, after = cells[1 : place + 1], list(zip(names, cells, strict=True))[place + 1 :]
        blank = not spaced and not any(cell.startswith(" ") for cell in before)
        return any((blank and cell.startswith(" ") and cell.strip()) or (not name and cell.strip())
                   for name, cell in after)  # fmt: skip

    return [(number, line) for number, line in enumerate(lines, start=1) if cut(line)]


def _separator(header: str, where: str) -> str:
    """That which splits a header into most of the known columns."""
    usual = "\t" if where.lower().endswith(".tsv") else ","

    def known(separator: str) -> tuple[int, bool]:
        names = [column_name(cell) for cell in header.replace('"', "").split(separator)]
        return sum(name in CAPTION_COLUMNS or names_files(name) for name in names), separator == usual

    return max(SEPARATORS, key=known)


def _separated_rows(content: bytes, where: str) -> Rows:
    text = _decoded(content, where)
    separator = _separator(text.lstrip().partition("\n")[0].strip(), where)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    header: Sequence[str] = ()
    try:
        for cells in lines:
            at = f"{where} line {lines.line_num}"
            if not header:
                header = _header(cells, at)
            elif cells:
                yield at, _cells(header, cells, separator, at)
    except csv.Error as exc:
        at = f"{where} line {lines.line_num}"
        long = "field limit" in str(exc)
        fix = "shorten it, or close the quote before it" if long else _FIX_QUOTES
        raise BadData("E-CAP-004", at, f"is not CSV ({exc})", fix) from None


def _header(cells: Sequence[str], at: str) -> list[str]:
    names = [column_name(cell) for cell in cells]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise BadData("E-CAP-004", at, f"has the column {twice[0]} twice", "rename one of them")
    return names


def _cells(header: Sequence[str], cells: Sequence[str], separator: str, at: str) -> Row:
    if any(cell.strip() for cell in cells[len(header) :]):
        problem = f"has {len(cells)} fields, the header has {len(header)}"
        fix = f'put a text with {separator!r} in it in quotes: a.png{separator}"red{separator} round"'
        raise BadData("E-CAP-008", at, problem, fix)
    # A short row lacks its last columns; fields beyond the header are blank.
    return dict(zip(header, cells, strict=False))


def _parquet_rows(content: bytes, where: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damage("E-CAP-004", where, "write it again"):
        file = pq.ParquetFile(pa.BufferReader(content))
        columns = [field.name for field in file.schema_arrow if _is_plain(field.type)]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{where} row {number}", {column_name(name): cell for name, cell in row.items()}


def _is_plain(kind: Any) -> bool:
    """Texts, lists of them, and integers: what names and captions may be."""
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind))
