"""The one table from exceptions to HTTP answers in OpenAI's error shape.

Errors that are not in the table are our bugs: the client gets a 500 that names the request id and nothing internal,
the log gets the traceback.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cluster.errors import (
    CannotContinue,
    EngineBusy,
    EngineDead,
    EngineFailed,
    HomeError,
    InvalidRequest,
    LoadUnavailable,
    ModelNotFound,
)
from rag.errors import EmbeddingMismatch, ParseError, StoreError
from services.errors import ApiError

# First match wins: subclasses stand before their bases.
_TABLE: tuple[tuple[type[Exception], int, str, str], ...] = (
    (InvalidRequest, 400, "invalid_request_error", "invalid_request"),
    (EngineBusy, 503, "service_unavailable", "engine_busy"),
    (EngineDead, 503, "service_unavailable", "engine_dead"),
    (EngineFailed, 500, "server_error", "generation_failed"),
    (CannotContinue, 409, "conflict_error", "cannot_continue"),
    (ModelNotFound, 404, "not_found_error", "model_not_found"),
    (LoadUnavailable, 501, "server_error", "experts_not_counted"),
    (HomeError, 507, "server_error", "storage_unavailable"),
    (ParseError, 422, "invalid_request_error", "unreadable_document"),
    (EmbeddingMismatch, 409, "conflict_error", "embedding_mismatch"),
    (StoreError, 503, "service_unavailable", "store_unavailable"),
)


def unwrap(error: BaseException) -> BaseException:
    """The error that was raised in the other process, where Ray wrapped it."""
    cause = getattr(error, "cause", None)
    return unwrap(cause) if isinstance(cause, BaseException) else error


def to_api_error(error: BaseException, request_id: str | None = None) -> ApiError:
    error = unwrap(error)
    if isinstance(error, ApiError):
        return error
    if _is_of_database(error):
        # Its own text holds the statement with everybody's data.
        cause = getattr(error, "orig", None)
        message = f"The database cannot be used: {cause}. Check its disk space and that it runs; then try again."
        return ApiError(503, "service_unavailable", "database_unavailable", message, retry_after_s=1)
    for kind, status, type_, code in _TABLE:
        if isinstance(error, kind):
            retry_after_s = (getattr(error, "retry_after_s", None) or 1) if status == 503 else None
            own_code = getattr(error, "code", None) or code
            return ApiError(status, type_, own_code, str(error), getattr(error, "param", None), retry_after_s)
    where = f" Request id: {request_id}." if request_id else ""
    return ApiError(500, "server_error", "internal_error", f"windfarm failed here; its log says why.{where}")


def _is_of_database(error: BaseException) -> bool:
    """Not by an import: model replicas have no database, and SQLAlchemy would be a third of their own start."""
    library = sys.modules.get("sqlalchemy.exc")
    if library is None or not isinstance(error, library.DatabaseError):
        return False
    # A damaged file is a plain DatabaseError. What a statement of ours did wrong is none of these.
    return not isinstance(error, library.IntegrityError | library.ProgrammingError | library.DataError)


def is_expected(error: BaseException) -> bool:
    """True for errors that the table knows: they need no traceback in the log."""
    return to_api_error(error).code != "internal_error"


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that failed after it began; no `[DONE]` follows it."""
    return b"data: " + json.dumps(error_body(error), ensure_ascii=False).encode() + b"\n\n"


def error_headers(error: ApiError) -> dict[str, str]:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers
