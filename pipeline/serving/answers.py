"""Errors in the shape of OpenAI's API: one line, no traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from pipeline.errors import BadData, ConfigError, one_line

CLIENT_GONE = 499  # nobody reads this answer; it is for the metrics


class Refused(Exception):
    """A request that is not served.

    status: of HTTP. code: of the error, for programs. retry_after: seconds.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    def response(self) -> Response:
        """The answer."""
        if self.status == CLIENT_GONE:
            return Response(status_code=CLIENT_GONE)
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error_response(self.status, self.message, self.code, headers=headers)


def error_response(
    status: int,
    message: str,
    code: str | None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as OpenAI's API words it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    error = {"message": one_line(message), "type": kind, "param": param and one_line(param), "code": code}
    return JSONResponse({"error": error}, status, headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every exception in one shape."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ConfigError, _user_error)
    app.add_exception_handler(BadData, _user_error)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


def _refused(_: Request, error: Any) -> Response:
    return error.response()


def _user_error(_: Request, error: Any) -> Response:
    return error_response(400, str(error), error.code, error.where)


def _invalid(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place)[:80] or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    if first["type"] == "model_attributes_type" and not param:
        message = "the body is no JSON object: send one, with the header Content-Type: application/json"
    return error_response(400, message, str(first["type"]), param)


def _http(_: Request, error: Any) -> Response:
    return error_response(error.status_code, str(error.detail), None, headers=error.headers)


def _bug(_: Request, error: Any) -> Response:
    return error_response(500, "the service failed on this request; its log says why", "internal_error")
