"""Which addresses may be fetched from: public ones, and those that the operator lists.

Judged is the address that a connection goes to, after the name was resolved, so it does not matter how somebody writes
it (decimal, octal, hexadecimal, a name that points there). An IPv4 address inside an IPv6 one is judged as itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import psutil

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_REFUSED = tuple(
    (ipaddress.ip_network(network), why)
    for network, why in (
        ("0.0.0.0/8", "this machine itself"),
        ("10.0.0.0/8", "a private network"),
        ("100.64.0.0/10", "a network between providers"),
        ("127.0.0.0/8", "this machine itself"),
        ("168.63.129.16/32", "a metadata service of a cloud"),
        ("169.254.0.0/16", "link-local, where clouds keep their metadata services"),
        ("172.16.0.0/12", "a private network"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "reserved for documentation"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "a private network"),
        ("198.18.0.0/15", "reserved for measurements"),
        ("198.51.100.0/24", "reserved for documentation"),
        ("203.0.113.0/24", "reserved for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "this machine itself"),
        ("::1/128", "this machine itself"),
        ("100::/64", "reserved"),
        ("2001:db8::/32", "reserved for documentation"),
        ("fc00::/7", "a private network"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "a private network"),
        ("ff00::/8", "multicast"),
    )
)
# Where the last 32 bits of an IPv6 address are an IPv4 address: IPv4-mapped, IPv4-compatible, IPv4-translated, NAT64
# (well-known and local prefix), ISATAP. RFC 4291, 6052, 8215, 5214.
_WITH_IPV4_AT_THE_END = tuple(
    ipaddress.IPv6Network(prefix)
    for prefix in ("::ffff:0:0/96", "::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_LOW_32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the operator lists: networks, and names of hosts whose addresses may be private ones."""

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Allowed:
        """An entry is an address, a network such as `10.1.0.0/16`, or a name. Raises `ValueError` for anything else."""
        networks: list[Network] = []
        hosts: set[str] = set()
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry))
                continue
            except ValueError:
                if "/" in entry or not entry or any(character.isspace() for character in entry):
                    raise ValueError(
                        f"{entry!r} is neither an address, a network such as 10.1.0.0/16, nor the name of a host."
                    ) from None
            hosts.add(plain_host(entry))
        return cls(tuple(networks), frozenset(hosts))

    def lists(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)


def plain_host(host: str) -> str:
    """Lower case, without the dot that may end a full name."""
    return host.lower().rstrip(".")


def why_refused(address: str, host: str, allowed: Allowed) -> str | None:
    """None where a connection to `address`, to which `host` resolved, may be made; otherwise what the address is."""
    try:
        outer = ipaddress.ip_address(address)
    except ValueError:
        return "no address that can be judged"
    candidates = (outer, *_inside(outer))
    if allowed.lists(outer) or allowed.lists(candidates[-1]):
        return None
    reasons = [why for each in candidates if (why := _what_it_is(each)) is not None]
    if not reasons:
        return None
    # A listed name may lead into private networks, never to link-local addresses, where metadata services are.
    if plain_host(host) in allowed.hosts and not any(each.is_link_local for each in candidates):
        return None
    return reasons[0]


def _what_it_is(address: Address) -> str | None:
    for network, why in _REFUSED:
        if address.version == network.version and address in network:
            return why
    if isinstance(address, IPv6Address) and _inside(address):
        return None  # Judged by the IPv4 address inside.
    if not address.is_global:
        return "not a public address"
    return "an address of this machine" if str(address) in _own_addresses() else None


def _inside(address: Address) -> tuple[Address, ...]:
    """IPv4 addresses that an IPv6 address stands for."""
    if not isinstance(address, IPv6Address) or address.is_loopback or address.is_unspecified:
        return ()
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo
    low = IPv4Address(int(address) & _LOW_32)
    is_isatap = (int(address) >> 32) & _LOW_32 in (0x00005EFE, 0x02005EFE)
    if is_isatap or any(address in prefix for prefix in _WITH_IPV4_AT_THE_END):
        return (low,)
    return ()


def _own_addresses() -> set[str]:
    """A public address of this very machine reaches services that trust whoever is on it."""
    found = (entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
    return {address.partition("%")[0] for address in found}
