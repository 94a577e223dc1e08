"""Why a URL was not fetched: a stable code, and a message with the next step."""

from __future__ import annotations


class FetchError(Exception):
    """`code`: bad_url, address_refused, unreachable, http_status, too_many_redirects, type_refused, too_large, too_slow
    or incomplete."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (str(self), self.code)


def _remake(message: str, code: str) -> FetchError:
    return FetchError(message, code=code)
