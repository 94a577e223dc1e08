"""Server-sent events over plain ASGI: bytes out as they come, comments while it is silent, cancel when the client goes.

The producer runs in the request's own task. Whoever closes the page, the tab or the socket cancels it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Result = TypeVar("Result")

KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ClientGone(Exception):
    """The client closed the connection; nobody is there to answer."""


class EventStream:
    """The answer of one streaming request. Nothing is sent before `begin` or the first event."""

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._send = send
        self._headers = [*_HEADERS, *headers]
        self.has_begun = False
        self.has_ended = False
        self._last_at = time.monotonic()

    async def begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})

    async def send(self, events: bytes) -> None:
        await self._write(events, more=True)

    async def end(self, events: bytes) -> None:
        """The last events; nothing can follow."""
        self.has_ended = True
        await self._write(events, more=False)

    async def _write(self, events: bytes, *, more: bool) -> None:
        if not self.has_begun:
            await self.begin()
        self._last_at = time.monotonic()
        await self._send({"type": "http.response.body", "body": events, "more_body": more})

    async def keep_alive(self, every_s: float) -> None:
        """Send a comment whenever nothing was sent for that long; runs until it is cancelled."""
        while not self.has_ended:
            silent_s = time.monotonic() - self._last_at
            if silent_s < every_s:
                await asyncio.sleep(every_s - silent_s)
                continue
            await self.begin()
            self._last_at = time.monotonic()
            await self._send({"type": "http.response.body", "body": KEEP_ALIVE_COMMENT, "more_body": True})


async def until_client_leaves(receive: Receive, work: Awaitable[Result], *companions: Awaitable[None]) -> Result:
    """The result of `work`, which is cancelled when the client disconnects (`ClientGone`).

    The request body must have been read. `work` runs in the present task, because one more for each request is felt.
    `companions` run along and are cancelled at the end.
    """
    worker = asyncio.current_task()
    assert worker is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        await _disconnected(receive)
        is_gone = True
        worker.cancel()

    helpers = [asyncio.ensure_future(each) for each in (watch(), *companions)]
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone and worker.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
