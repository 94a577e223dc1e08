"""The guarded client against a real server: redirects, slow, endless and lying answers, and connections to the address
that was judged."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import subprocess
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.web.addresses import Allowed
from services.web.client import Fetched, FetchLimits, GuardedClient
from services.web.errors import FetchError
from services.web.guard import Resolve, resolve
from tests.services.web_server import WebServer, Write, page, redirect, web_server

LISTED = Allowed.of(["127.0.0.1"])
QUICK = FetchLimits(max_bytes=100_000, timeout_s=5, max_redirects=3)


@asynccontextmanager
async def talking(
    allowed: Allowed = LISTED, limits: FetchLimits = QUICK, resolve: Resolve = resolve
) -> AsyncIterator[tuple[WebServer, GuardedClient]]:
    async with web_server() as server, GuardedClient(allowed, limits, resolve=resolve) as client:
        yield server, client


async def fetch(client: GuardedClient, url: str, **options: object) -> tuple[Fetched, bytes]:
    body = bytearray()
    fetched = await client.fetch(url, body.extend, **options)  # type: ignore[arg-type]
    return fetched, bytes(body)


async def refusal(client: GuardedClient, url: str, **options: object) -> str:
    with pytest.raises(FetchError) as refused:
        await fetch(client, url, **options)
    assert str(refused.value).endswith((".", ")"))
    return refused.value.code


async def test_a_page_is_fetched_where_the_operator_lists_the_address() -> None:
    async with talking() as (server, client):
        server.answers["/a?b=c"] = page(b"<p>Hello", "text/HTML; charset=utf-8")
        fetched, body = await fetch(client, server.url("/a?b=c#part"))
        assert (body, fetched.content_type, fetched.num_bytes) == (b"<p>Hello", "text/html", 8)
        assert f"Host: 127.0.0.1:{server.port}" in server.asked[0]
        assert "cookie" not in server.asked[0].lower() and "authorization" not in server.asked[0].lower()


async def test_nothing_is_sent_to_an_address_that_is_not_listed() -> None:
    async with talking(allowed=Allowed()) as (server, client):
        for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "127.0.0.1."):
            assert await refusal(client, server.url(host=host)) in ("address_refused", "unreachable", "bad_url")
        assert server.asked == []


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.2/", "http://169.254.169.254/latest/meta-data/", "//[::1]/", "http://0/", "http://localhost.:1/"],
)
async def test_a_redirect_to_a_refused_address_is_refused(target: str) -> None:
    allowed = Allowed.of(["127.0.0.1"])

    async def somewhere_else(host: str, port: int) -> list[str]:
        return ["127.0.0.2"] if host.startswith("localhost") else await resolve(host, port)

    async with talking(allowed, resolve=somewhere_else) as (server, client):
        server.answers["/"] = redirect(target)
        assert await refusal(client, server.url()) == "address_refused"
        assert len(server.asked) == 1


async def test_a_redirect_to_something_that_is_no_web_address_is_refused() -> None:
    async with talking() as (server, client):
        for target in ("file:///etc/passwd", "gopher://x/", "http://a@127.0.0.1/"):
            server.answers["/"] = redirect(target)
            assert await refusal(client, server.url()) == "bad_url"
        server.answers["/"] = page(b"", status="302 Found")
        assert await refusal(client, server.url()) == "http_status"


async def test_redirects_are_followed_up_to_the_limit_and_only_where_the_caller_wants() -> None:
    async with talking() as (server, client):
        for number in range(6):
            server.answers[f"/{number}"] = redirect(f"/{number + 1}", "308 Permanent Redirect")
        server.answers["/6"] = page(b"there")
        fetched, body = await fetch(client, server.url("/3"))
        assert (body, fetched.url.path) == (b"there", "/6")
        assert await refusal(client, server.url("/2")) == "too_many_redirects"
        assert await refusal(client, server.url("/3"), may_follow=lambda url: url.path != "/5") == "address_refused"


async def test_a_name_is_resolved_once_and_the_connection_goes_to_that_address() -> None:
    """Whoever answers the first question with a public and the second with a private address gains nothing."""
    asked: list[str] = []

    async def first_this_then_that(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.3"]

    async with talking(resolve=first_this_then_that) as (server, client):
        server.answers["/"] = page(b"Hello")
        assert (await fetch(client, server.url(host="rebind.test")))[1] == b"Hello"
        assert asked == ["rebind.test"]
        assert f"Host: rebind.test:{server.port}" in server.asked[0]


async def test_a_name_with_one_refused_address_among_others_is_refused() -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.1"]

    async with talking(resolve=mixed) as (server, client):
        assert await refusal(client, server.url(host="mixed.test")) == "address_refused"
        assert server.asked == []


async def test_of_public_hosts_only_the_usual_ports_are_fetched() -> None:
    async def public(host: str, port: int) -> list[str]:
        return ["93.184.215.14"]

    async with talking(resolve=public) as (_, client):
        assert await refusal(client, "http://example.org:6379/") == "address_refused"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=wiki.test"
    names = ("-addext", "subjectAltName=DNS:wiki.test", "-keyout", str(key), "-out", str(certificate))
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return key, certificate


async def test_over_tls_the_name_of_the_url_is_asked_for_and_checked(tmp_path: Path) -> None:
    key, certificate = make_certificate(tmp_path)
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(certificate, key)
    names: list[str | None] = []
    server_tls.sni_callback = lambda _socket, name, _context: names.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def to_here(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with web_server(server_tls) as server, GuardedClient(LISTED, QUICK, tls=trusting, resolve=to_here) as client:
        server.answers["/"] = page(b"Hello")
        assert (await fetch(client, f"https://wiki.test:{server.port}/"))[1] == b"Hello"
        assert names == ["wiki.test"]
        assert await refusal(client, f"https://other.test:{server.port}/") in ("incomplete", "unreachable")
        server.answers["/"] = redirect(f"http://wiki.test:{server.port}/")
        assert await refusal(client, f"https://wiki.test:{server.port}/") == "address_refused", "down to http"


async def test_large_answers_are_cut_off_whatever_they_declare() -> None:
    async def endless(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n")
        while True:
            await write(b"x" * 65_536)

    async with talking() as (server, client):
        server.answers = {"/declared": page(b"x", Content_Length="1000000"), "/endless": endless}
        assert await refusal(client, server.url("/declared")) == "too_large"
        assert await refusal(client, server.url("/endless")) == "too_large"
        server.answers["/small"] = page(b"x" * 2000)
        assert await refusal(client, server.url("/small"), max_bytes=1000) == "too_large"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_decompression_bomb_is_counted_after_unpacking(encoding: str) -> None:
    raw = bytes(50 << 20)
    bomb = gzip.compress(raw) if encoding == "gzip" else zlib.compress(raw)
    assert len(bomb) < QUICK.max_bytes
    written = 0

    def count(piece: bytes) -> None:
        nonlocal written
        written += len(piece)

    async with talking() as (server, client):
        server.answers["/"] = page(bomb, Content_Encoding=encoding)
        with pytest.raises(FetchError) as refused:
            await client.fetch(server.url(), count)
        assert refused.value.code == "too_large" and written <= QUICK.max_bytes


async def test_packed_answers_are_unpacked_and_broken_ones_refused() -> None:
    text = b"Words, words, words. " * 500
    raw_deflate = zlib.compressobj(wbits=-15)
    async with talking() as (server, client):
        for packed, encoding in (
            (gzip.compress(text), "gzip"),
            (zlib.compress(text), "deflate"),
            (raw_deflate.compress(text) + raw_deflate.flush(), "deflate"),
            (text, "identity"),
        ):
            server.answers["/"] = page(packed, Content_Encoding=encoding)
            assert (await fetch(client, server.url()))[1] == text
        server.answers["/"] = page(gzip.compress(text)[:-20], Content_Encoding="gzip")
        assert await refusal(client, server.url()) == "incomplete"
        server.answers["/"] = page(b"\x1f\x8bnonsense", Content_Encoding="gzip")
        assert await refusal(client, server.url()) == "incomplete"
        server.answers["/"] = page(text, Content_Encoding="br")
        assert await refusal(client, server.url()) == "type_refused"


async def test_slow_servers_are_given_up() -> None:
    async def drops(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            await write(b".")
            await asyncio.sleep(0.05)

    async def silent(write: Write) -> None:
        await asyncio.Event().wait()

    async with talking(limits=FetchLimits(timeout_s=0.5)) as (server, client):
        server.answers = {"/drops": drops, "/silent": silent}
        assert await refusal(client, server.url("/drops")) == "too_slow"
        assert await refusal(client, server.url("/silent")) == "too_slow"


async def test_lying_and_broken_answers_are_errors_and_never_half_a_page() -> None:
    async def breaks_off(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 500\r\n\r\n<p>Half")

    async def no_http(write: Write) -> None:
        await write(b"SSH-2.0-OpenSSH_9.2\r\n")

    async def endless_headers(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\n")
        while True:
            await write(b"X-Header: " + b"x" * 1000 + b"\r\n")

    async with talking() as (server, client):
        server.answers = {"/breaks": breaks_off, "/ssh": no_http, "/headers": endless_headers}
        for path in server.answers:
            assert await refusal(client, server.url(path)) == "incomplete"
        server.answers = {"/500": page(b"", status="500 Oh no"), "/403": page(b"", status="403 No")}
        for path in (*server.answers, "/404"):
            assert await refusal(client, server.url(path)) == "http_status"


async def test_types_that_hold_no_text_are_refused_before_their_body() -> None:
    async with talking() as (server, client):
        server.answers["/"] = page(b"x" * 50_000, "video/mp4")
        assert await refusal(client, server.url(), types=("text/html",)) == "type_refused"


async def test_a_closed_port_is_said() -> None:
    async with talking() as (_, client):
        assert await refusal(client, "http://127.0.0.1:9/") == "unreachable"
