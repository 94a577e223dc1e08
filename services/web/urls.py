"""URLs as the guarded client takes them, and as names of documents."""

from __future__ import annotations

import re
from urllib.parse import unquote

import httpx

from rag.filenames import name_of_path
from services.web.errors import FetchError

DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_CHARACTERS = 4000
_NOT_IN_URLS = re.compile(r"[\s\\\x00-\x20\x7f]")


def checked_url(url: str) -> httpx.URL:
    """The URL, without its fragment. Raises `FetchError` (`bad_url`) where it is not a plain http or https one."""
    if len(url) > _MAX_CHARACTERS or _NOT_IN_URLS.search(url):
        raise _bad(url, f"it is longer than {_MAX_CHARACTERS} characters or holds spaces or backslashes")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise _bad(url, str(error)) from error
    if parsed.scheme not in DEFAULT_PORTS:
        raise _bad(url, "only http:// and https:// are fetched")
    if parsed.userinfo:
        raise _bad(url, "it holds a user name before the host, which can hide where it leads")
    if not host or not 0 < port_of(parsed) < 65536:
        raise _bad(url, "it names no host, or a port that there is not")
    return parsed.copy_with(fragment=None)


def port_of(url: httpx.URL) -> int:
    return DEFAULT_PORTS[url.scheme] if url.port is None else url.port


def document_name(url: httpx.URL) -> str:
    """Host, path and query as a file name, such as `example.org › docs › setup.html`: names hold no slashes, and pages
    of the same last part must stay apart."""
    parts = [unquote(part).replace("/", "-") for part in url.path.split("/") if part]
    query = unquote(url.query.decode("ascii", "replace")).replace("/", "-")
    last = f"{parts.pop() if parts else ''} ({query})".lstrip() if query else None
    return name_of_path([url.host, *parts, *([last] if last else [])])


def _bad(url: str, why: str) -> FetchError:
    shown = url if len(url) <= 100 else f"{url[:97]}..."
    return FetchError(
        f"{shown!r} cannot be fetched: {why}. Give an address such as https://example.org/page.", code="bad_url"
    )
