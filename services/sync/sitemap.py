"""A website as a source: the pages that its sitemap names, fetched by the guarded client as robots.txt permits.

Only pages of the sitemap's own host are taken, also behind redirects. Sitemaps: https://www.sitemaps.org/protocol.html;
robots.txt: RFC 9309.
"""

from __future__ import annotations

import asyncio
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self
from urllib.robotparser import RobotFileParser

import httpx

from services.sync.connector import ConnectorError, Content, Item, Listing, Skipped
from services.sync.ignore import Ignore
from services.web.client import USER_AGENT, Fetched, GuardedClient
from services.web.decoding import decoder_for
from services.web.errors import FetchError
from services.web.pages import parser_name, readable_types
from services.web.urls import checked_url, document_name, port_of

_MAX_SITEMAP_BYTES = 50 << 20
_MAX_ROBOTS_BYTES = 512 << 10
_MAX_SITEMAPS = 100
_MAX_PAGES = 50_000
_MAX_DELAY_S = 30.0
_AGENT = USER_AGENT.partition("/")[0]


class SitemapConnector:
    """See `Connector`. `location`: a sitemap, or any page of a website; then robots.txt or /sitemap.xml names it."""

    interval_s = 3600.0

    def __init__(
        self, location: str, open_client: Callable[[], GuardedClient], *, patterns: Sequence[str] = ()
    ) -> None:
        try:
            self._location = checked_url(location)
        except FetchError as error:
            raise ConnectorError(str(error)) from error
        self._open_client = open_client
        self._ignore = Ignore(patterns)
        self._robots = RobotFileParser()
        self._last_fetch = 0.0
        self._runner: asyncio.Runner | None = None
        self.source = f"sitemap:{self._location}"

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        self._client = self._open_client()
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            self._runner.run(self._client.__aexit__(None, None, None))
            self._runner.close()

    def list_items(self) -> Listing:
        try:
            self._read_robots()
            pages = self._pages()
        except FetchError as error:
            raise ConnectorError(str(error)) from error
        items: dict[str, Item] = {}
        skipped: list[Skipped] = []
        for address, modified_at in pages.items():
            if why := self._why_not(address):
                skipped.append(Skipped(address, why))
                continue
            url = checked_url(address)
            if not self._ignore.matches(PurePosixPath(url.path.lstrip("/") or "index"), is_folder=False):
                items.setdefault(document_name(url), Item(document_name(url), str(url), modified_at=modified_at))
        return Listing(list(items.values()), skipped)

    def content(self, item: Item) -> Content:
        self._be_patient()
        body = bytearray()
        try:
            fetched = self._run(
                self._client.fetch(item.origin, body.extend, types=readable_types(), may_follow=self._may_follow)
            )
        except FetchError as error:
            raise ConnectorError(str(error)) from error
        return Content(bytes(body), parser_name(fetched.url, fetched.content_type))

    def _be_patient(self) -> None:
        """As long between two pages as robots.txt asks for, up to a bound."""
        delay = float(self._robots.crawl_delay(_AGENT) or 0.0)
        left = self._last_fetch + min(delay, _MAX_DELAY_S) - time.monotonic()
        if left > 0:
            time.sleep(left)
        self._last_fetch = time.monotonic()

    def _read_robots(self) -> None:
        try:
            text = self._text(self._location.copy_with(raw_path=b"/robots.txt"), _MAX_ROBOTS_BYTES)
        except FetchError as error:
            # No such file: everything is allowed. No answer: nothing is (RFC 9309, 2.3.1).
            if error.code == "http_status" and "status 4" in str(error):
                self._robots.parse([])
                return
            raise
        self._robots.parse(text.decode("utf-8", "replace").splitlines())

    def _pages(self) -> dict[str, float | None]:
        """Addresses that the sitemaps name, with the time of their last change."""
        waiting, seen, pages = self._sitemaps(), set[str](), dict[str, float | None]()
        while waiting:
            address = waiting.pop(0)
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > _MAX_SITEMAPS:
                raise ConnectorError(f"{self._location} has more than {_MAX_SITEMAPS} sitemaps. Name one of them.")
            if why := self._why_not(address):
                raise ConnectorError(f"The sitemap {address} is not read: {why}")
            found, more = _read_sitemap(self._text(checked_url(address), _MAX_SITEMAP_BYTES), address)
            waiting += more
            pages |= {page: found[page] or pages.get(page) for page in found}
            if len(pages) > _MAX_PAGES:
                raise ConnectorError(f"{self._location} names more than {_MAX_PAGES} pages. Name one of its sitemaps.")
        return pages

    def _sitemaps(self) -> list[str]:
        if self._location.path.endswith((".xml", ".xml.gz", ".txt")):
            return [str(self._location)]
        root = self._location.copy_with(raw_path=b"/sitemap.xml")
        return self._robots.site_maps() or [str(root)]

    def _text(self, url: httpx.URL, max_bytes: int) -> bytes:
        body = bytearray()
        self._run(self._client.fetch(str(url), body.extend, max_bytes=max_bytes, may_follow=self._is_same_host))
        if body[:2] != b"\x1f\x8b":
            return bytes(body)
        unpacked = bytearray()
        for piece in (decoder := decoder_for("gzip")).feed(bytes(body)):
            unpacked += piece
            if len(unpacked) > max_bytes:
                raise FetchError(f"{url} unpacks to more than {max_bytes >> 20} MiB.", code="too_large")
        decoder.check_end()
        return bytes(unpacked)

    def _run(self, work: Coroutine[Any, Any, Fetched]) -> Fetched:
        assert self._runner is not None, "used as a context manager"
        return self._runner.run(work)

    def _may_follow(self, url: httpx.URL) -> bool:
        return self._why_not(str(url)) is None

    def _why_not(self, address: str) -> str | None:
        try:
            url = checked_url(address)
        except FetchError as error:
            return str(error)
        if not self._is_same_host(url):
            return "It lies on another host."
        return None if self._robots.can_fetch(_AGENT, str(url)) else "robots.txt of the website forbids it."

    def _is_same_host(self, url: httpx.URL) -> bool:
        mine, other = self._location, url
        return (mine.raw_host, port_of(mine), mine.scheme) == (other.raw_host, port_of(other), other.scheme)


def _read_sitemap(text: bytes, address: str) -> tuple[dict[str, float | None], list[str]]:
    """(pages, further sitemaps) of an XML sitemap, an index of sitemaps, or a plain list of addresses."""
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        lines = (line.strip() for line in text.decode("utf-8-sig", "replace").splitlines())
        return {line: None for line in lines if line.startswith(("http://", "https://"))}, []
    if b"<!DOCTYPE" in text[:1000] or b"<!ENTITY" in text:
        raise ConnectorError(f"{address} is no sitemap: it declares a document type.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ConnectorError(f"{address} is no sitemap that can be read ({error}).") from error
    kind = _tag(root)
    if kind not in ("urlset", "sitemapindex"):
        raise ConnectorError(f"{address} is no sitemap: it is a <{kind}>.")
    entries = {
        " ".join((fields.get("loc") or "").split()): _moment(fields.get("lastmod"))
        for fields in ({_tag(child): child.text for child in entry} for entry in root)
        if fields.get("loc")
    }
    return ({}, list(entries)) if kind == "sitemapindex" else (entries, [])


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _moment(text: str | None) -> float | None:
    """Seconds since 1970 of a W3C date; none where it is not one, or names a day alone (the page may change on it)."""
    if text is None or "T" not in text:
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return moment.timestamp() if moment.tzinfo is not None else None
