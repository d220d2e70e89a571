"""Files behind a URL, through fsspec."""

from __future__ import annotations

import errno
import os
import posixpath
from collections import Counter
from pathlib import Path
from typing import Any

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
    reason,
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
        import fsspec

        protocol = self._name.partition("://")[0]
        if protocol in {"file", "local"} or "::" in self._name:
            fix = "write a plain path, or one such as s3://bucket/images"
            raise InputMissing("E-INP-060", self._name, "is not the URL of a store", fix)
        try:
            store, path = fsspec.url_to_fs(self._name)
        except (ImportError, ValueError) as exc:
            fix = f"pip install fsspec[{protocol}], or correct the URL"
            raise InputMissing("E-INP-061", self._name, f"cannot be opened ({reason(exc)})", fix) from None
        return store, path.rstrip("/")

    def files(self) -> list[File]:
        """See `Tree.files`. Raises InputMissing if the store cannot be listed."""
        store, path = self._store.get(self._open)
        try:
            entries: dict[str, dict[str, Any]] = store.find(path, detail=True)
        except Exception as exc:  # Each store has its own.
            fix = "check the URL, the network and your credentials"
            raise InputMissing("E-INP-062", self._name, f"cannot be listed ({reason(exc)})", fix) from None
        names = {full.removeprefix(path).removeprefix("/"): about for full, about in entries.items()}
        hidden = [kind for name in names if (kind := _ignored(name))]
        self.ignored = Counter(hidden)
        shown = (name for name in names if posixpath.basename(name) and not _ignored(name))
        files = [_remote_file(name, names[name]) for name in shown]
        return sorted(files, key=by_name)

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`. Raises StorageError where the store does not answer."""
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
            fix = "check the network and your credentials, then run it again"
            raise StorageError("E-IO-060", where, f"cannot be read ({reason(exc)})", fix) from None
        if len(content) > limit:
            raise too_many_bytes(where, len(content), limit)
        return content

    def fetch(self, file: File, path: Path) -> None:
        """Copy a file to `path`, as a whole or not at all. Raises StorageError where the store does not answer."""
        store, folder = self._store.get(self._open)
        where, partial = f"{self._name}/{printable(file.name)}", path.with_suffix(".part")
        try:
            store.get_file(f"{folder}/{file.name}", str(partial))
            if partial.stat().st_size != file.size:
                raise EOFError(f"{partial.stat().st_size} of {file.size} bytes")
        except FileNotFoundError:
            raise missing(where) from None
        except Exception as exc:  # Each store has its own.
            if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
                raise
            fix = "check the network and your credentials, then run it again"
            raise StorageError("E-IO-060", where, f"cannot be fetched ({reason(exc)})", fix) from None
        os.replace(partial, path)


def _ignored(name: str) -> str:
    return next((kind_of_ignored(part) for part in name.split("/") if is_ignored(part)), "")


def _remote_file(name: str, about: dict[str, Any]) -> File:
    size = int(about.get("size") or 0)
    tag = next((about[key] for key in _TAGS if about.get(key) is not None), "")
    return File(name, size, f"{size}-{str(tag).strip(chr(34))}")
