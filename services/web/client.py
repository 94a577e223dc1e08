"""The one client that fetches what users name: guarded addresses, followed redirects, limits on size, time and type.

Sends no key, no cookie, and nothing of the environment's proxies. Every hop is checked like the first.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType

import httpcore
import httpx

from services.web.addresses import Allowed
from services.web.decoding import ACCEPTED, decoder_for
from services.web.errors import FetchError
from services.web.guard import GuardedBackend, Resolve, resolve
from services.web.urls import checked_url, port_of

USER_AGENT = "windfarm/0.1"
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`max_bytes`: of a body after unpacking; `timeout_s`: for all of it, redirects included."""

    max_bytes: int = 64 << 20
    timeout_s: float = 60.0
    max_redirects: int = 5
    ports: tuple[int, ...] = (80, 443)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came. `url`: after all redirects; `content_type`: lower case, without parameters."""

    url: httpx.URL
    content_type: str
    num_bytes: int


class GuardedClient:
    """Use as an asynchronous context manager. `tls` and `resolve` are for tests and private certificate authorities."""

    def __init__(
        self,
        allowed: Allowed,
        limits: FetchLimits | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self._limits = limits or FetchLimits()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls or httpx.create_ssl_context(),
            max_connections=4,
            network_backend=GuardedBackend(allowed, self._limits.ports, resolve),
        )

    async def __aenter__(self) -> GuardedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()

    async def fetch(
        self,
        url: str,
        write: Callable[[bytes], object],
        *,
        types: Collection[str] | None = None,
        max_bytes: int | None = None,
        may_follow: Callable[[httpx.URL], bool] = lambda _: True,
    ) -> Fetched:
        """Hand the body of `url` to `write`, piece by piece. Raises `FetchError`; what was written then is useless.

        `types`: content types that are taken; `may_follow` says of each redirect whether it may be followed.
        """
        limit = min(self._limits.max_bytes, max_bytes or self._limits.max_bytes)
        try:
            async with asyncio.timeout(self._limits.timeout_s), self._answer(checked_url(url), may_follow) as answer:
                at, response = answer
                content_type = _content_type(response)
                _check_type(at, content_type, types)
                num_bytes = await _read(response, write, at, limit)
                return Fetched(at, content_type, num_bytes)
        except TimeoutError:
            raise FetchError(
                f"{url} took longer than {self._limits.timeout_s:g} s. Try again, or raise ingestion.web.timeout_s.",
                code="too_slow",
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, ssl.SSLError) as error:
            raise FetchError(
                f"{url} broke off: {error or type(error).__name__}. Try again.", code="incomplete"
            ) from error

    @asynccontextmanager
    async def _answer(
        self, url: httpx.URL, may_follow: Callable[[httpx.URL], bool]
    ) -> AsyncIterator[tuple[httpx.URL, httpcore.Response]]:
        """The first answer that is no redirect, with its headers; the body is still to be read."""
        for _ in range(self._limits.max_redirects + 1):
            async with self._pool.stream("GET", _target(url), headers=_HEADERS) as response:
                if response.status not in _REDIRECTS:
                    _check_status(url, response.status)
                    yield url, response
                    return
                url = _next(url, response, may_follow)
        raise FetchError(
            f"{url} is the end of more than {self._limits.max_redirects} redirects. Give the address where they lead.",
            code="too_many_redirects",
        )


_HEADERS = [
    (b"User-Agent", USER_AGENT.encode()),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", ACCEPTED.encode()),
]


def _target(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=port_of(url), target=url.raw_path)


def _next(url: httpx.URL, response: httpcore.Response, may_follow: Callable[[httpx.URL], bool]) -> httpx.URL:
    location = _header(response, b"location")
    if location is None:
        raise FetchError(f"{url} redirects without saying where to.", code="http_status")
    try:
        joined = str(url.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchError(f"{url} redirects to something that is no address ({error}).", code="bad_url") from error
    following = checked_url(joined)
    if url.scheme == "https" and following.scheme == "http":
        raise FetchError(
            f"{url} redirects from https to http ({following}), where anybody on the way could change it.",
            code="address_refused",
        )
    if not may_follow(following):
        raise FetchError(f"{url} redirects to {following}, which is not to be fetched here.", code="address_refused")
    return following


def _check_status(url: httpx.URL, status: int) -> None:
    if status != 200:
        advice = "Check that it is there for everybody" if status < 500 else "Try again later"
        raise FetchError(f"{url} answered with status {status}. {advice}.", code="http_status")


def _check_type(url: httpx.URL, content_type: str, types: Collection[str] | None) -> None:
    if types is not None and content_type not in types:
        raise FetchError(
            f"{url} is of the type {content_type or 'unknown'!r}, which holds no text that can be read here.",
            code="type_refused",
        )


async def _read(response: httpcore.Response, write: Callable[[bytes], object], url: httpx.URL, max_bytes: int) -> int:
    declared = _header(response, b"content-length") or ""
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(url, max_bytes)
    decoder = decoder_for(_header(response, b"content-encoding") or "")
    num_bytes = 0
    async for raw in response.aiter_stream():
        for piece in decoder.feed(raw):
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise _too_large(url, max_bytes)
            write(piece)
        # Unpacking a bomb takes no await of its own; the clock must be able to stop it.
        await asyncio.sleep(0)
    decoder.check_end()
    return num_bytes


def _too_large(url: httpx.URL, max_bytes: int) -> FetchError:
    return FetchError(
        f"{url} is larger than the {max_bytes / (1 << 20):g} MiB that are taken. Raise ingestion.max_file_mib.",
        code="too_large",
    )


def _content_type(response: httpcore.Response) -> str:
    return (_header(response, b"content-type") or "").partition(";")[0].strip().lower()


def _header(response: httpcore.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return str(value.decode("latin-1"))
    return None
