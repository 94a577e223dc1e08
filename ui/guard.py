"""What stands in front of the page: a content policy, and a key check before files are taken in.

The page itself is public and holds nothing. Its upload route would store files for anybody, so it demands a valid key
like everything else. Pure ASGI: streams pass untouched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx

from ui.api_client import ApiClient, ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Gradio needs inline scripts and `Function`; nothing may be loaded from or sent to another address.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_UPLOAD_ROUTES = ("/gradio_api/upload", "/upload")


class Guard:
    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], *, http: httpx.AsyncClient) -> None:
        self._app = app
        self._http = http

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        refusal = await self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_guarded)
        else:
            await _answer(send_guarded, *refusal)

    async def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if scope["method"] != "POST" or scope["path"].rstrip("/") not in _UPLOAD_ROUTES:
            return None
        kind, _, key = _header(scope, b"authorization").partition(" ")
        if kind.lower() != "bearer" or not key:
            return 401, "Sign in before adding files."
        try:
            await ApiClient(self._http, key.strip()).me()
        except ApiError as error:
            return error.status or 503, error.message
        return None


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
