"""One HTTP listener for an ASGI app, inside a running event loop (that of a Ray actor, for example).

The socket is bound here, before the server starts, so that a taken port is a clear error and an ephemeral port is
known at once. No signal handlers, no access log, no server header. Stopping drains: no new connections, running
requests go on up to a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn

# Longer than the clients' own limit, so that it is always the client that gives an idle connection up: a request sent
# at the moment when the server closes would be lost.
KEEP_ALIVE_S = 75
BACKLOG = 2048
# How long a connection that was taken just before the listener stops may wait with its first request.
_FIRST_REQUEST_S = 1.0
_LOOK_S = 0.02
_CLONE_NEWNET = 0x40000000


class ListenError(OSError):
    """The address cannot be bound."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with an event to await the start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.has_started.set()


class Listener:
    """A running listener; made by `start_listener`."""

    def __init__(self, server: _Server, task: asyncio.Task[None], host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._server = server
        self._task = task

    @property
    def url(self) -> str:
        """Where to reach it from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    @property
    def is_running(self) -> bool:
        return not self._task.done()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more connections, let running requests finish for `drain_s` seconds, then cancel them. Idempotent."""
        if drain_s and self.is_running:
            for server in self._server.servers:
                server.close()
            await self._let_first_requests_come(min(drain_s, _FIRST_REQUEST_S))
        self._server.config.timeout_graceful_shutdown = drain_s  # type: ignore[assignment]  # fractions work as well
        self._server.should_exit = True
        await asyncio.wait([self._task])
        self._task.result()

    async def _let_first_requests_come(self, limit_s: float) -> None:
        """uvicorn would close a connection that has no request yet, and its client would see that request fail."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit_s
        await asyncio.sleep(_LOOK_S)  # what was taken last becomes a connection
        while loop.time() < until and any(  # noqa: ASYNC110  # uvicorn does not announce it
            getattr(connection, "cycle", self) is None for connection in self._server.server_state.connections
        ):
            await asyncio.sleep(_LOOK_S)


async def start_listener(
    app: Callable[..., Any],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    websockets: bool = False,
    lifespan: bool = False,
) -> Listener:
    """Serve `app` at `host`:`port` (0: any free port); returns when connections are accepted.

    `lifespan` runs the app's own start and shutdown events.
    """
    return await start_listener_on([bind_socket(host, port)], app, websockets=websockets, lifespan=lifespan)


async def start_listener_on(
    sockets: Sequence[socket.socket], app: Callable[..., Any], *, websockets: bool = False, lifespan: bool = False
) -> Listener:
    """The same on bound sockets, of which the first one is the listener's address. It closes them when it stops."""
    host, port = sockets[0].getsockname()[:2]
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="websockets-sansio" if websockets else "none",
        lifespan="on" if lifespan else "off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )
    server = _Server(config)
    task = asyncio.create_task(_serve(server, list(sockets)), name=f"listener {host}:{port}")
    started = asyncio.create_task(server.has_started.wait())
    try:
        await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
    finally:
        started.cancel()
    if task.done():
        for sock in sockets:
            sock.close()
        task.result()
    return Listener(server, task, host, port)


def bind_socket(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A bound TCP socket, not yet listening."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ListenError(f"{host!r} is not an address of this machine: {error}. Use 127.0.0.1 or 0.0.0.0.") from error
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ListenError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another port or free it."
        ) from error
    sock.setblocking(False)
    return sock


def bind_socket_in(namespace: Path, host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A socket of another network namespace (a file such as /proc/PID/ns/net); it stays there, only root may.

    A thread of its own enters the namespace, so that nothing else of this process does.
    """

    def bind() -> socket.socket:
        with namespace.open("rb") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise ListenError(number, f"{namespace} cannot be entered: {os.strerror(number)}")
        return bind_socket(host, port, reuse_port=reuse_port)

    with ThreadPoolExecutor(1, thread_name_prefix="namespace") as thread:
        return thread.submit(bind).result()


async def _serve(server: _Server, sockets: list[socket.socket]) -> None:
    try:
        await server.serve(sockets=sockets)
    except SystemExit as error:  # uvicorn's way to say that the app's own start failed; it must not end our process
        raise RuntimeError("The app's start-up failed; the log above says why.") from error
