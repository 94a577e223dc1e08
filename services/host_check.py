"""Refuses requests that name a foreign host while the endpoint listens on loopback.

A web page can make a visitor's browser call 127.0.0.1 under a name of its own (DNS rebinding); such a request carries
that name in its Host header. Where the endpoint listens on the network on purpose, any name may be right.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from services.errors import ApiError


class HostCheck:
    def __init__(self, listen_host: str, allowed_hosts: Sequence[str] = ()) -> None:
        self._is_loopback = is_loopback(listen_host)
        self._allowed = {host.lower() for host in allowed_hosts}

    def check(self, host_header: str) -> None:
        if not self._is_loopback:
            return
        host = _without_port(host_header).lower()
        if is_loopback(host) or host in self._allowed:
            return
        raise ApiError(
            421,
            "invalid_request_error",
            "unknown_host",
            f"This windfarm listens on this machine alone, but the request is for the host '{host}'. Use 127.0.0.1, or "
            "add the name to platform.listen.allowed_hosts in ray_config.yaml.",
        )


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host
