"""From a URL to a file that the parser reads: which types are taken, and the name that says the type."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import httpx

from rag.filenames import extension_of
from rag.filetypes import endings_by_mime_type
from services.config import WebConfig
from services.web.addresses import Allowed
from services.web.client import Fetched, FetchLimits, GuardedClient

_ALIASES = {
    "application/atom+xml": "xml",
    "application/rss+xml": "xml",
    "application/x-yaml": "yaml",
    "application/xhtml+xml": "html",
    "text/markdown": "md",
    "text/rtf": "rtf",
    "text/x-markdown": "md",
    "text/xml": "xml",
    "text/yaml": "yaml",
}
# Servers call many files so; then the name in the URL decides.
_SAY_NOTHING = ("", "text/plain", "application/octet-stream", "binary/octet-stream")


def readable_types() -> Collection[str]:
    """Content types of an answer that may hold text to search."""
    return {*endings_by_mime_type(), *_ALIASES, *_SAY_NOTHING}


def open_client(config: WebConfig, max_file_mib: float) -> GuardedClient:
    """The guarded client as the operator configured it. Raises `ValueError` for a list that cannot be read."""
    limits = FetchLimits(
        max_bytes=int(max_file_mib * (1 << 20)),
        timeout_s=config.timeout_s,
        max_redirects=config.max_redirects,
        ports=tuple(config.ports),
    )
    return GuardedClient(Allowed.of(config.allowed), limits)


async def fetch_page(client: GuardedClient, url: str, target: Path) -> tuple[Fetched, str]:
    """Write what a URL leads to into a file. Returns what came and the name by which the parser knows its type."""
    with await asyncio.to_thread(_new_file, target) as file:
        fetched = await client.fetch(url, file.write, types=readable_types())
    return fetched, parser_name(fetched.url, fetched.content_type)


def _new_file(path: Path) -> BinaryIO:
    """Never a former one written over: that may have a second name by which it is kept."""
    path.unlink(missing_ok=True)
    return path.open("wb")


def parser_name(url: httpx.URL, content_type: str) -> str:
    """The last part of the path; with an ending of its type where it has another one."""
    last = unquote(url.path.rstrip("/").rpartition("/")[2]).replace("/", "-") or "index"
    if content_type in _SAY_NOTHING:
        return last
    endings = endings_by_mime_type()
    alias = _ALIASES.get(content_type)
    fitting = endings.get(content_type) or next((found for found in endings.values() if alias in found), ())
    return last if extension_of(last) in fitting else f"{last}.{alias or fitting[0]}"
