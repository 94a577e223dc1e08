"""The only way to a connection of the guarded client: a name is resolved once, every address judged, and the connection
made to the very address that was judged. So nothing that changes between a check and its use matters."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpcore

from services.web.addresses import Allowed, why_refused
from services.web.errors import FetchError

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a host, the preferred first."""

_CONNECT_WITHIN_S = 10.0


async def resolve(host: str, port: int) -> list[str]:
    """As the machine resolves names. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects for httpcore, which speaks TLS and HTTP over it with the name of the URL."""

    def __init__(self, allowed: Allowed, ports: Iterable[int], resolve: Resolve = resolve) -> None:
        self._allowed = allowed
        self._ports = frozenset(ports)
        self._resolve = resolve
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        timeout = min(timeout or _CONNECT_WITHIN_S, _CONNECT_WITHIN_S)
        last: Exception | None = None
        for address in addresses:
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise FetchError(
            f"{host}:{port} does not take connections ({last}). Check the address; then try again.", code="unreachable"
        ) from last

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchError(f"{host} has no address ({error}). Check its name.", code="unreachable") from error
        if not addresses:
            raise FetchError(f"{host} has no address. Check its name.", code="unreachable")
        for address in addresses:
            if why := why_refused(address, host, self._allowed):
                raise FetchError(
                    f"{host} leads to {address}: {why}. windfarm fetches from public addresses only; whoever runs "
                    "it may list others under ingestion.web.allowed in ray_config.yaml.",
                    code="address_refused",
                )
            self._check_port(host, port, address)
        return addresses

    def _check_port(self, host: str, port: int, address: str) -> None:
        is_public = why_refused(address, host, Allowed()) is None
        if is_public and port not in self._ports:
            raise FetchError(
                f"{host}:{port} cannot be fetched: of public hosts only the ports "
                f"{', '.join(map(str, sorted(self._ports)))} are (ingestion.web.ports in ray_config.yaml).",
                code="address_refused",
            )

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise FetchError("Sockets of this machine are not fetched from.", code="address_refused")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)
