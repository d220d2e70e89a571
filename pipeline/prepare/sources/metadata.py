"""Captions of images in metadata files, as imagefolder has them: rows of file_name and texts."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.errors import BadData
from pipeline.prepare.sources.files import damage
from pipeline.text.captions import MAX_CAPTION, normalise

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "label")
_FIX = 'write {"file_name": "a.png", "text": "a caption"}'
_FIX_TABLE = "give it the columns file_name and text"
Texts = dict[str, list[str]]


def clean_captions(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """Normalised captions without repeats and empty ones. Raises BadData E-CAP-003 where one is too long."""
    captions = tuple(dict.fromkeys(filter(None, map(normalise, texts))))
    for caption in captions:
        if len(caption) > MAX_CAPTION:
            problem = f"holds a caption of {len(caption)} characters, the limit is {MAX_CAPTION}"
            raise BadData("E-CAP-003", where, problem, "shorten it")
    return captions


def read_metadata(content: bytes, where: str) -> Texts:
    """Texts of each file_name in a metadata file, whose suffix names its format.

    Raises BadData E-CAP-004, which names the bad line.
    """
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[posixpath.splitext(where)[1]]
    texts: Texts = {}
    for at, row in rows(content, where):
        name, listed = _described(row, at)
        texts.setdefault(name, []).extend(listed)
    return texts


def _json_rows(content: bytes, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        at = f"{where} line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise BadData("E-CAP-004", at, "is not JSON in UTF-8", _FIX) from None
        if not isinstance(row, dict):
            raise BadData("E-CAP-004", at, "is not a JSON object", _FIX)
        yield at, row


def _csv_rows(content: bytes, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        at = f"{where} line {content.count(10, 0, exc.start) + 1}"
        raise BadData("E-CAP-004", at, "is not UTF-8", "save it as UTF-8") from None
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            yield f"{where} line {rows.line_num}", row
    except csv.Error as exc:
        at = f"{where} line {rows.reader.line_num}"
        raise BadData("E-CAP-004", at, f"is not CSV ({exc})", _FIX_TABLE) from None


def _parquet_rows(content: bytes, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damage("E-CAP-004", where, "write it again"):
        file = pq.ParquetFile(pa.BufferReader(content))
        columns = [name for name in file.schema_arrow.names if name in CAPTION_COLUMNS or _names_files(name)]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{where} row {number}", row


def _names_files(column: object) -> bool:
    return isinstance(column, str) and (column == "file_name" or column.endswith("_file_name"))


def _described(row: Mapping[str, Any], at: str) -> tuple[str, list[str]]:
    """file_name and texts of one row of metadata. Raises BadData E-CAP-004."""
    columns = sorted(filter(_names_files, row), key=lambda column: column != "file_name")
    name = row[columns[0]] if columns else None
    if not isinstance(name, str) or not name:
        raise BadData("E-CAP-004", at, "has no file_name", _FIX)
    column = next((column for column in CAPTION_COLUMNS if column in row), "")
    texts = texts_of(row.get(column))
    if texts is None and column == "label" and type(row[column]) is int:
        texts = [f"class {row[column]}"]
    if texts is None:
        raise BadData("E-CAP-004", at, f"has a {column} that is not text", _FIX)
    return name, texts


def texts_of(value: object) -> list[str] | None:
    """The texts in a cell: none, one, or a list of them; None where it holds anything else."""
    listed: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    return listed if all(isinstance(text, str) for text in listed) else None
