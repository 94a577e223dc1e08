"""Network namespaces for the nodes of one machine: each node gets an address of its own on a bridge that leads nowhere.

Only root may make them. Names carry the tag of their windfarm, so that they can be found and deleted after a crash too.
Deleting a namespace deletes its interfaces. Standard library only: the guardian uses it.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

# Set aside for tests of network devices (RFC 2544), so no real network has it.
_SUBNET = "198.18.0"
_PREFIX_LENGTH = 24
MAX_NODES = 32


class NetworkRefused(Exception):
    """Namespaces cannot be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a node of this machine runs. Without `namespace` it is in that of the machine."""

    address: str
    namespace: str | None = None

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, made to run there."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, *command]


def loopback_seats(count: int) -> list[Seat]:
    """Addresses 127.0.0.1, 127.0.0.2 and so on: own addresses, but no network between them."""
    return [Seat(f"127.0.0.{number}") for number in range(1, count + 1)]


def namespace_seats(tag: str, count: int) -> list[Seat]:
    """The seats that `make_network` makes. Each windfarm's network is apart, so all have the same addresses."""
    return [Seat(f"{_SUBNET}.{number}", _namespace(tag, number)) for number in range(1, count + 1)]


def why_no_network() -> str | None:
    """Why networks cannot be made here; found out by making one."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if shutil.which("ip") is None:
        return "there is no `ip` command (package iproute2)"
    tag = secrets.token_hex(4)
    try:
        make_network(tag, 1)
    except NetworkRefused as error:
        return str(error)
    delete_network(tag)
    return None


def make_network(tag: str, count: int) -> None:
    """Make `count` namespaces on one bridge. The machine itself has no address on it, so that Ray, which listens on all
    interfaces of a node that is not on loopback, is closed to everybody else.

    Raises `NetworkRefused`; then nothing is left behind.
    """
    try:
        _ip("link", "add", _bridge(tag), "type", "bridge")
        _ip("link", "set", _bridge(tag), "up")
        for number, seat in enumerate(namespace_seats(tag, count), 1):
            _add(tag, number, seat)
    except NetworkRefused:
        delete_network(tag)
        raise


def delete_network(tag: str) -> None:
    """Delete all namespaces and interfaces of this windfarm. Safe where there are none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return
    for name in interfaces(tag):
        _ip("link", "del", name, must_work=False)
    for name in namespaces(tag):
        _ip("netns", "del", name, must_work=False)


def namespaces(tag: str) -> list[str]:
    """Names of the namespaces of this windfarm that are there."""
    folder = "/run/netns"
    found = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in found if name.startswith(_namespace(tag, "")))


def interfaces(tag: str) -> list[str]:
    """Names of the bridge and the outer ends of the nodes' links that are there. Deleting an end deletes the link."""
    return sorted(name for name in os.listdir("/sys/class/net") if name.startswith(f"wf{tag[:8]}"))


def _add(tag: str, number: int, seat: Seat) -> None:
    assert seat.namespace is not None
    outside = f"wf{tag[:8]}v{number}"
    _ip("netns", "add", seat.namespace)
    _ip("link", "add", outside, "type", "veth", "peer", "name", "wf0", "netns", seat.namespace)
    _ip("link", "set", outside, "master", _bridge(tag))
    _ip("link", "set", outside, "up")
    inside = ("netns", "exec", seat.namespace, "ip")
    _ip(*inside, "addr", "add", f"{seat.address}/{_PREFIX_LENGTH}", "dev", "wf0")
    _ip(*inside, "link", "set", "wf0", "up")
    _ip(*inside, "link", "set", "lo", "up")


def _namespace(tag: str, number: int | str) -> str:
    return f"wf-{tag[:8]}-{number}"


def _bridge(tag: str) -> str:
    """At most 15 characters, as the kernel has it."""
    return f"wf{tag[:8]}br"


def _ip(*arguments: str, must_work: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode and must_work:
        raise NetworkRefused(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
