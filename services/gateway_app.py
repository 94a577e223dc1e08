"""The public endpoint: one ASGI application that lets nothing through unchecked and answers every request.

Host, key, route, handler, error answer, metrics and log, in this order; what the routes do lies in their own files.
Nothing here imports an engine or Ray; the process outlives all model replicas.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from services.accounts import Accounts, Actor, missing_key, wrong_key
from services.error_responses import error_body, error_headers, is_expected, to_api_error
from services.errors import ApiError, not_found
from services.event_stream import ClientGone, Receive, Send
from services.host_check import HostCheck
from services.metrics import Metrics
from services.routing import Answer, Call, Route, Router, json_answer
from services.ui_proxy import UiProxy

API_PREFIX = "/v1/"
_CLIENT_GONE = 499
_BEARER = "bearer "
_access_log = logging.getLogger("windfarm.access")
_log = logging.getLogger(__name__)


class GatewayApp:
    """Made of its parts, so that it runs in tests without Ray."""

    def __init__(
        self, routes: list[Route], accounts: Accounts, metrics: Metrics, hosts: HostCheck, ui: UiProxy | None
    ) -> None:
        self._router = Router(routes)
        self._accounts = accounts
        self._metrics = metrics
        self._hosts = hosts
        self._ui = ui

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        call = Call(scope, receive, _Sent(send), f"req_{secrets.token_hex(10)}")
        self._metrics.began()
        try:
            answer = await self._serve(call)
            if answer is not None:
                call.status = answer.status
                await call.answer(answer, {"x-request-id": call.request_id})
        except ClientGone:
            call.status = _CLIENT_GONE
        except Exception as error:  # noqa: BLE001  # every request gets an answer
            await self._fail(call, error)
        finally:
            self._account(call)

    async def _serve(self, call: Call) -> Answer | None:
        self._hosts.check(call.headers.get("host", ""))
        found = self._router.find(call.method, _raw_path(call.scope))
        if found is None:
            return await self._other(call)
        route, call.parameters = found
        call.route = route.template
        if not route.is_open:
            call.sign_in(await self._authenticate(call))
        return await route.handler(call)

    async def _other(self, call: Call) -> Answer | None:
        """Whatever is not the API is the page's."""
        if call.path.startswith(API_PREFIX) or call.path == "/v1" or self._ui is None:
            raise not_found(f"There is no {call.path} here. See the README for what there is.", code="unknown_path")
        call.route = "page"
        call.status = await self._ui.http(call.scope, call.receive, call.send)
        return None

    async def _authenticate(self, call: Call) -> Actor:
        header = call.headers.get("authorization", "")
        if not header:
            raise missing_key()
        if not header.lower().startswith(_BEARER):
            raise wrong_key()
        key = header[len(_BEARER) :].strip()
        actor = self._accounts.cached(key)
        if actor is None:
            actor = await asyncio.to_thread(self._accounts.authenticate, key)
        return actor

    async def _websocket(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            self._hosts.check(headers.get(b"host", b"").decode("latin-1"))
        except ApiError as error:
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        if self._ui is None or scope["path"].startswith(API_PREFIX):
            await send({"type": "websocket.close", "code": 1008, "reason": "no websocket here"})
            return
        await self._ui.websocket(scope, receive, send)

    async def _fail(self, call: Call, error: Exception) -> None:
        if not is_expected(error):
            _log.error("Request %s failed: %s %s", call.request_id, call.method, call.route, exc_info=error)
        failure = to_api_error(error, call.request_id)
        call.status = failure.status
        if isinstance(call.send, _Sent) and call.send.has_begun:
            raise error  # too late for an answer: the server cuts the connection, which no client takes for an end
        extra = {"x-request-id": call.request_id, **error_headers(failure)}
        await call.answer(json_answer(error_body(failure), failure.status), extra)

    def _account(self, call: Call) -> None:
        duration_s = time.monotonic() - call.started_at
        self._metrics.ended(call.route, call.method, call.status, call.model, duration_s)
        _access_log.info(
            "%s %s %s %d %.0fms user=%s model=%s client_user=%s",
            call.request_id,
            call.method,
            call.route,
            call.status,
            duration_s * 1000,
            call.actor_name,
            call.model or "-",
            call.client_user or "-",
        )


class _Sent:
    """Remembers whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def __call__(self, message: Any) -> None:
        self.has_begun = True
        await self._send(message)


def _raw_path(scope: Mapping[str, Any]) -> str:
    """The path as it was sent, so that a name may hold an encoded slash."""
    raw = scope.get("raw_path")
    return raw.decode("latin-1").split("?")[0] if raw else scope["path"]
