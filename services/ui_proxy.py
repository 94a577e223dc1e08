"""Forwards everything that is not the API to the page's own process: HTTP, server-sent events and websockets.

The page listens on an internal port and demands the internal secret, which only this proxy adds. Bodies are streamed
both ways; a browser that leaves ends the connection behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
from yarl import URL

from services.discovery import ReplicaEndpoint
from services.event_stream import ClientGone, Receive, Send, until_client_leaves
from services.relay import INTERNAL_HEADER
from services.routing import body_too_long

_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
_WEBSOCKET_HANDSHAKE = {
    b"sec-websocket-key",
    b"sec-websocket-version",
    b"sec-websocket-extensions",
    b"sec-websocket-protocol",
}
_MAX_MESSAGE = 64 << 20
_MIB = 1 << 20
_STARTING = b"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>windfarm</title><style>body{font:16px system-ui;display:grid;place-items:center;height:90vh;margin:0;
color-scheme:light dark}</style></head><body><main><h1>windfarm is starting</h1>
<p>The page comes up in a few seconds; it reloads by itself.</p></main></body></html>"""


class UiProxy:
    """`endpoints` gives the live processes of the page; `session` must keep no cookies."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoints: Callable[[], list[ReplicaEndpoint]],
        secret: str,
        max_body_mib: float,
    ) -> None:
        self._session = session
        self._endpoints = endpoints
        self._secret = secret
        self._max_body_mib = max_body_mib

    async def http(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> int:
        """Forward one request; returns the status that was answered."""
        endpoint = self._endpoint()
        if endpoint is None:
            return await _starting(send)
        body = _RequestBody(receive, self._max_body_mib)
        try:
            response = await self._session.request(
                scope["method"],
                _url(endpoint, scope),
                data=body.blocks() if _has_body(scope) else None,
                headers=self._headers(scope),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            )
        except (aiohttp.ClientConnectionError, OSError, TimeoutError):
            if body.failure is not None:
                raise body.failure from None
            return await _starting(send)
        async with response:
            headers = [(name.lower(), value) for name, value in response.raw_headers]
            kept = [(name, value) for name, value in headers if name not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            await until_client_leaves(receive, _pump(response, send))
            return response.status

    async def websocket(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        endpoint = self._endpoint()
        if endpoint is None:
            await send({"type": "websocket.close", "code": 1013, "reason": "windfarm is starting"})
            return
        headers = [(n, v) for n, v in self._headers(scope) if n.lower().encode() not in _WEBSOCKET_HANDSHAKE]
        try:
            upstream = await self._session.ws_connect(
                _url(endpoint, scope),
                headers=headers,
                protocols=tuple(scope.get("subprotocols", ())),
                max_msg_size=_MAX_MESSAGE,
            )
        except (aiohttp.ClientError, OSError, TimeoutError):
            await send({"type": "websocket.close", "code": 1013, "reason": "the page cannot be reached"})
            return
        async with upstream:
            await receive()  # the browser's websocket.connect
            await send({"type": "websocket.accept", "subprotocol": upstream.protocol})
            await _both_ways(upstream, receive, send)

    def _endpoint(self) -> ReplicaEndpoint | None:
        ready = [endpoint for endpoint in self._endpoints() if endpoint.state == "ready"]
        return ready[0] if ready else None

    def _headers(self, scope: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The client's own headers, what proxies add, and the secret; a secret from outside never passes."""
        present = {name for name, _ in scope["headers"]}
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in _HOP_BY_HOP and name != INTERNAL_HEADER.encode()
        ]
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        client = scope.get("client")
        added = {
            "x-forwarded-for": client[0] if client else "",
            "x-forwarded-proto": {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"]),
            "x-forwarded-host": host,
        }
        headers += [(name, value) for name, value in added.items() if value and name.encode() not in present]
        return [*headers, (INTERNAL_HEADER, self._secret)]


class _RequestBody:
    """What the browser sends, block by block. `failure` is why it ended early; the connection error hides that."""

    def __init__(self, receive: Receive, max_mib: float) -> None:
        self._receive = receive
        self._max_mib = max_mib
        self.failure: Exception | None = None

    async def blocks(self) -> AsyncIterator[bytes]:
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._fail(ClientGone())
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_mib * _MIB:
                self._fail(body_too_long(self._max_mib))
            if chunk:
                yield chunk
            if not message.get("more_body", False):
                return

    def _fail(self, failure: Exception) -> None:
        self.failure = failure
        raise ConnectionResetError("the browser's request ended early")


async def _pump(response: aiohttp.ClientResponse, send: Send) -> None:
    async for chunk in response.content.iter_any():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _both_ways(upstream: aiohttp.ClientWebSocketResponse, receive: Receive, send: Send) -> None:
    tasks = [asyncio.create_task(_to_page(upstream, receive)), asyncio.create_task(_to_browser(upstream, send))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _to_page(upstream: aiohttp.ClientWebSocketResponse, receive: Receive) -> None:
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await upstream.send_str(message["text"])
        else:
            await upstream.send_bytes(message["bytes"])


async def _to_browser(upstream: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    async for message in upstream:
        kind = "text" if message.type is aiohttp.WSMsgType.TEXT else "bytes"
        await send({"type": "websocket.send", kind: message.data})
    await send({"type": "websocket.close", "code": upstream.close_code or 1000})


def _url(endpoint: ReplicaEndpoint, scope: Mapping[str, Any]) -> URL:
    raw_path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").split("?")[0]
    query = scope["query_string"].decode("latin-1")
    return URL(endpoint.url + raw_path + (f"?{query}" if query else ""), encoded=True)


def _has_body(scope: Mapping[str, Any]) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"content-length" in names or b"transfer-encoding" in names


async def _starting(send: Send) -> int:
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"retry-after", b"2"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _STARTING})
    return 503
