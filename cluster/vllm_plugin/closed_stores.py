"""Keeps torch's meeting points closed: the store that ranks meet in listens on the address it was given, and no other.

torch binds it to all interfaces, and whoever reaches it reads and writes it without any key. vLLM opens the first one
before it loads plugins, so this part travels inside vLLM's configuration and is on as soon as that is unpickled.
"""

from __future__ import annotations

import importlib
import socket
from typing import Any

OPTION = "windfarm_closed_stores"


class Closed(str):
    """A word in vLLM's `additional_config`; a process that receives it keeps its stores closed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (str(self),)


def closed_stores_option() -> dict[str, Any]:
    """To be merged into `additional_config`."""
    return {OPTION: Closed("on")}


def install() -> None:
    """Change torch's own function in this process. Safe to call twice."""
    from torch.distributed import TCPStore

    # By name: a function of the package hides the module.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    original = rendezvous._create_c10d_store
    if getattr(original, "is_closed", False):
        return

    def create(hostname: str, port: int, rank: int, world_size: int, timeout: Any, use_libuv: bool = True) -> Any:
        if rank != 0 or rendezvous._torchelastic_use_agent_store():
            return original(hostname, port, rank, world_size, timeout, use_libuv)
        bound = _listen(hostname, port)
        # The store owns the descriptor from now on.
        return TCPStore(
            host_name=hostname,
            port=bound.getsockname()[1],
            world_size=world_size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=bound.detach(),
            use_libuv=use_libuv,
        )

    create.is_closed = True  # type: ignore[attr-defined]
    rendezvous._create_c10d_store = create  # type: ignore[attr-defined]


def _listen(hostname: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen()
    return listening


def _receive(text: str) -> Closed:
    install()
    return Closed(text)
