"""Files behind a URL, through fsspec and its package for the URL's protocol."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from pipeline.errors import AccessError, Busy, InputMissing, PipelineError, StorageError, reason

_NOT_NOW = {429, 500, 502, 503, 504}  # HTTP
_AWAY = ("Connect", "Timeout")  # in names of exceptions that are no OSError, such as botocore's


def open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises InputMissing where it is not the URL of a store."""
    import fsspec

    protocol = url.partition("://")[0]
    if protocol in {"file", "local"} or "::" in url:
        fix = "write a plain path, or one such as s3://bucket/images"
        raise InputMissing("E-INP-060", url, "is not the URL of a store", fix)
    try:
        store, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as exc:
        fix = f"pip install fsspec[{protocol}], or correct the URL"
        raise InputMissing("E-INP-061", url, f"cannot be opened ({reason(exc)})", fix) from None
    return store, path.rstrip("/")


def store_error(exc: Exception, where: str, failed: str) -> PipelineError:
    """The error for what a store raised; `failed` says what could not be done.

    AccessError: it refuses these credentials, or there are none. Busy: it is out of reach or overloaded, or the
    connection broke. StorageError: anything else.
    """
    for cause in _causes(exc):
        problem = f"{failed} ({reason(cause)})"
        if _is_refusal(cause):
            return AccessError("E-ACC-060", where, problem, "check your credentials and their permissions")
        if _is_away(cause):
            fix = "check the network and the store's address, then run it again"
            return Busy("E-BUSY-062", where, problem, fix)
    fix = "check the URL and its store, then run it again"
    return StorageError("E-IO-060", where, f"{failed} ({reason(exc)})", fix)


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__


def _http_status(exc: BaseException) -> int | None:
    status = getattr(exc, "status", None) or getattr(getattr(exc, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_refusal(exc: BaseException) -> bool:
    named = any(word in type(exc).__name__ for word in ("Credential", "Authentication"))
    return isinstance(exc, PermissionError) or named or _http_status(exc) in (401, 403)


def _is_away(exc: BaseException) -> bool:
    status = _http_status(exc)
    if status is not None:
        return status in _NOT_NOW
    if isinstance(exc, FileNotFoundError):
        return False
    if isinstance(exc, OSError):
        return exc.errno != errno.EINVAL
    return isinstance(exc, EOFError) or any(word in type(exc).__name__ for word in _AWAY)
