"""The deployment that serves the page, on a port of its own that only the public endpoint can use.

The one place where services meet the UI: it mounts what the UI package builds and hands it the public address. All that
the page does goes through that address, over HTTP, with the visitor's own key.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ray import serve

from services.beats import RayBeatStore
from services.config import PlatformConfig
from services.discovery import Beacon, ReplicaEndpoint
from services.environment import public_url, read_environment
from services.listener import start_listener
from services.ray_adapter import close_replica_ports
from services.relay import INTERNAL_HEADER
from services.replica_log import log_into_replica_file

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Ui:
    """One replica of the page: made and ended by Serve, reached through its own listener only."""

    async def __init__(self, config: PlatformConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        close_replica_ports()
        log_into_replica_file()
        environment = read_environment()
        create_app = await asyncio.to_thread(_load_page)
        page = create_app(public_url(config.listen, environment), max_file_mib=config.max_body_mib)
        guarded = demand_secret(page, environment.internal_secret)
        self._listener = await start_listener(guarded, environment.internal_host, websockets=True, lifespan=True)
        replica_id = serve.get_replica_context().replica_id.unique_id
        endpoint = ReplicaEndpoint(replica_id, "platform", self._listener.url, os.getpid())
        self._beacon = Beacon(RayBeatStore(), endpoint)
        await self._beacon.start()

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._listener.is_running:
            raise RuntimeError("the page's listener has ended")

    async def __del__(self) -> None:
        """Serve awaits it when it stops the replica."""
        await self._beacon.stop()
        await self._listener.stop()


def _load_page() -> Callable[..., App]:
    """Not at the top: Gradio takes seconds to load, and Serve loads this module also to build the application."""
    from ui.app import create_app

    return create_app


def demand_secret(app: App, secret: str) -> App:
    """`app` behind the internal header: whoever does not send the secret gets nothing but 403."""
    name, expected = INTERNAL_HEADER.encode(), secret.encode()

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _has_secret(scope, name, expected):
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    return guarded


def _has_secret(scope: Scope, name: bytes, expected: bytes) -> bool:
    return any(key == name and secrets.compare_digest(value, expected) for key, value in scope.get("headers", ()))
