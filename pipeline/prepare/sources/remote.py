"""Files behind a URL, through fsspec."""

from __future__ import annotations

import errno
import posixpath
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.data.store import open_store, store_error
from pipeline.errors import InputMissing, PipelineError, StorageError
from pipeline.prepare.limits import too_many_bytes
from pipeline.prepare.sources.files import (
    File,
    PerProcess,
    by_name,
    is_ignored,
    kind_of_ignored,
    missing,
    printable,
)

_TAGS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)


class RemoteTree:
    """Files below a URL such as `s3://bucket/images`, by name, through fsspec and its package for it."""

    def __init__(self, url: str) -> None:
        self._name = url.rstrip("/")
        self._store: PerProcess[tuple[Any, str]] = PerProcess()
        self.ignored: Counter[str] = Counter()

    def _open(self) -> tuple[Any, str]:
        return open_store(self._name)

    def files(self) -> list[File]:
        """See `Tree.files`. Raises Busy where the store is out of reach, AccessError where it refuses, InputMissing
        where it has no such bucket or the like."""
        store, path = self._store.get(self._open)
        try:
            entries: dict[str, dict[str, Any]] = store.find(path, detail=True)
            if not entries:
                _require_answer(store, path)
        except Exception as exc:  # Each store has its own.
            error = store_error(exc, self._name, "cannot be listed")
            if isinstance(error, StorageError):
                raise InputMissing("E-INP-062", self._name, error.problem, "correct the URL") from None
            raise error from None
        names = {full.removeprefix(path).removeprefix("/"): about for full, about in entries.items()}
        hidden = [kind for name in names if (kind := _ignored(name))]
        self.ignored = Counter(hidden)
        shown = (name for name in names if posixpath.basename(name) and not _ignored(name))
        files = [_remote_file(name, names[name]) for name in shown]
        return sorted(files, key=by_name)

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`. Raises what `store_error` says where the store does not answer."""
        store, path = self._store.get(self._open)
        where = f"{self._name}/{printable(name)}"
        try:
            size = store.size(f"{path}/{name}") or 0
            if size > limit:
                raise too_many_bytes(where, size, limit)
            content: bytes = store.cat_file(f"{path}/{name}")
            if len(content) < size:
                raise EOFError(f"{len(content)} of {size} bytes")
        except PipelineError:
            raise
        except FileNotFoundError:
            raise missing(where) from None
        except Exception as exc:
            raise store_error(exc, where, "cannot be read") from None
        if len(content) > limit:
            raise too_many_bytes(where, len(content), limit)
        return content

    def fetch(self, file: File, path: Path) -> None:
        """Copy a file to `path`. Raises what `store_error` says where the store does not answer."""
        store, folder = self._store.get(self._open)
        where = f"{self._name}/{printable(file.name)}"
        try:
            store.get_file(f"{folder}/{file.name}", str(path))
            if path.stat().st_size != file.size:
                raise EOFError(f"{path.stat().st_size} of {file.size} bytes")
        except FileNotFoundError:
            raise missing(where) from None
        except Exception as exc:  # Each store has its own.
            if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
                raise
            raise store_error(exc, where, "cannot be fetched") from None


def _require_answer(store: Any, path: str) -> None:
    """Raise what keeps a store from saying whether there is anything at `path`: HTTP servers list nothing then."""
    try:
        store.info(path)
    except FileNotFoundError as exc:
        if exc.__cause__ is not None:
            raise


def _ignored(name: str) -> str:
    return next((kind_of_ignored(part) for part in name.split("/") if is_ignored(part)), "")


def _remote_file(name: str, about: dict[str, Any]) -> File:
    size = int(about.get("size") or 0)
    tag = next((about[key] for key in _TAGS if about.get(key) is not None), "")
    return File(name, size, f"{size}-{str(tag).strip(chr(34))}")
