"""What the services tell their callers when something cannot be done. Each message names the cause and the next step.

`ApiError` is the one error that crosses process borders (Ray pickles it) and reaches clients as it is; everything else
is turned into one by the table in `error_responses`.
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that fails, with everything an OpenAI-shaped error answer needs."""

    def __init__(
        self,
        status: int,
        type: str,
        code: str | None,
        message: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.type, self.code, self.message, self.param, self.retry_after_s)


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong; sending it again unchanged cannot work."""
    return ApiError(400, "invalid_request_error", code, message, param)


def not_found(message: str, *, code: str = "not_found", param: str | None = None) -> ApiError:
    return ApiError(404, "not_found_error", code, message, param)


def forbidden(message: str, *, code: str = "forbidden") -> ApiError:
    return ApiError(403, "permission_error", code, message)


def conflict(message: str, *, code: str = "conflict", param: str | None = None) -> ApiError:
    return ApiError(409, "conflict_error", code, message, param)


def unavailable(message: str, *, code: str, retry_after_s: int = 1) -> ApiError:
    """Nothing is wrong with the request; the same one may work later."""
    return ApiError(503, "service_unavailable", code, message, retry_after_s=retry_after_s)
