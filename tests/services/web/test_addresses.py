"""Addresses that are not public are refused in every notation, unless the operator lists them."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from services.web.addresses import Allowed, why_refused
from services.web.errors import FetchError
from services.web.guard import resolve
from services.web.urls import checked_url, document_name

NOBODY = Allowed()


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.9"),
        *("168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.1.1"),
        *("198.18.0.1", "203.0.113.5", "224.0.0.1", "255.255.255.255"),
        *("::", "::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2001:db8::1"),
        # IPv4 inside of IPv6: mapped, compatible, translated, NAT64 in both prefixes, 6to4, Teredo, ISATAP
        *("::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "::ffff:0:10.0.0.1", "64:ff9b::169.254.169.254"),
        *("64:ff9b:1::10.0.0.1", "2002:7f00:0001::", "2002:a9fe:a9fe::1", "2001:0:7f00:1::"),
        *("2001:0:4136:e378:8000:63bf:80ff:fffe", "2600::5efe:10.0.0.1", "::ffff:168.63.129.16"),
        "no address",
    ],
)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert why_refused(address, "example.org", NOBODY)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert why_refused(address, "example.org", NOBODY) is None


def test_addresses_of_this_machine_are_refused_also_where_they_are_public(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"eth9": [SimpleNamespace(address="93.184.215.14")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: mine)
    assert why_refused("93.184.215.14", "example.org", NOBODY) == "an address of this machine"


def test_what_the_operator_lists_is_allowed_and_nothing_beside_it() -> None:
    allowed = Allowed.of(["10.1.0.0/16", "::1", "Wiki.Corp.example."])
    assert why_refused("10.1.2.3", "x", allowed) is None
    assert why_refused("::ffff:10.1.2.3", "x", allowed) is None
    assert why_refused("::1", "x", allowed) is None
    assert why_refused("10.2.0.1", "x", allowed)
    assert why_refused("10.2.0.1", "wiki.corp.example", allowed) is None
    assert why_refused("169.254.169.254", "wiki.corp.example", allowed), "a name opens no metadata service"
    assert why_refused("169.254.169.254", "x", Allowed.of(["169.254.169.254"])) is None


@pytest.mark.parametrize("entry", ["10.1.0.5/16", "10.0.0.0/99", "", "two words"])
def test_a_list_that_cannot_be_read_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="neither an address"):
        Allowed.of([entry])


@pytest.mark.parametrize(
    "host",
    [
        *("2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1", "0", "localhost", "localhost."),
        *("[::1]", "[::ffff:127.0.0.1]", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u24dbocalhost"),
    ],
)
async def test_every_notation_of_loopback_ends_at_a_refused_address(host: str) -> None:
    try:
        url = checked_url(f"http://{host}/")
        addresses = await resolve(url.raw_host.decode(), 80)
    except (FetchError, OSError):
        return  # Refused before, or no host at all.
    assert addresses and all(why_refused(address, host, NOBODY) for address in addresses), addresses


@pytest.mark.parametrize(
    "url",
    [
        *(
            "file:///etc/passwd",
            "ftp://example.org/",
            "gopher://127.0.0.1:6379/_x",
            "data:text/plain,x",
            "//example.org/",
        ),
        *("http://example.org@127.0.0.1/", "http://user:secret@example.org/", "http://example.org\\@127.0.0.1/"),
        *(
            "http://exa mple.org/",
            "http://example.org/\r\nHost: x",
            "http://example.org/\x00",
            "http://",
            "http:///x",
            "",
        ),
        *("http://example.org:0/", "http://example.org:99999/", "http://[::1", "http://" + "x" * 5000, "javascript:1"),
    ],
)
def test_what_is_no_plain_web_address_is_refused(url: str) -> None:
    with pytest.raises(FetchError) as refused:
        checked_url(url)
    assert refused.value.code == "bad_url"


def test_names_of_pages_keep_apart_what_has_the_same_last_part() -> None:
    assert document_name(checked_url("https://Example.org/docs/index.html#x")) == "example.org › docs › index.html"
    assert document_name(checked_url("https://example.org/")) == "example.org"
    assert document_name(checked_url("https://example.org/p?id=1")) == "example.org › p (id=1)"
    long = ["https://example.org/" + "a" * 300 + end + "b" * 300 for end in "xy"]
    names = [document_name(checked_url(url)) for url in long]
    assert names[0] != names[1] and all(len(name) <= 200 for name in names)
