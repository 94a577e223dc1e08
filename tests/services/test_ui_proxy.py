"""The page behind the endpoint: everything but the API goes through, streamed, with the secret that only we add."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from services.config import PlatformConfig
from services.discovery import ReplicaEndpoint, encode_beat
from services.listener import start_listener
from services.page import demand_secret
from tests.services.harness import SECRET, Running, ScriptedEngine, running_endpoint, wait_until


class Page:
    """A small page that tells what reached it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.go_on = asyncio.Event()
        self.was_left = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        if scope["type"] == "websocket":
            await self._echo(receive, send)
        elif scope["path"] == "/stream":
            await self._stream(receive, send)
        else:
            body = b""
            while (message := await receive()).get("more_body"):
                body += message["body"]
            await _respond(send, body + message["body"])

    async def _stream(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        waits = [asyncio.create_task(self.go_on.wait()), asyncio.create_task(_until_left(receive))]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if waits[1].done():
            self.was_left.set()
        for task in waits:
            task.cancel()
        await send({"type": "http.response.body", "body": b"data: 2\n\n"})

    async def _echo(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": f"you said {message['text']}"})
        self.was_left.set()


async def _until_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"echo:" + body})


@asynccontextmanager
async def page_behind_endpoint(home: Path, config: PlatformConfig | None = None) -> Any:
    page = Page()
    listener = await start_listener(demand_secret(page, SECRET), websockets=True)
    async with running_endpoint(home, ScriptedEngine(), config=config) as running:
        beat = ReplicaEndpoint("page1", "platform", listener.url, 1)
        running.beats.put(beat.key, encode_beat(beat))
        await running.directory.refresh()
        try:
            yield running, page
        finally:
            await listener.stop()


def _headers(scope: Any) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in scope["headers"]}


async def test_requests_reach_the_page_with_what_a_proxy_adds(tmp_path: Path) -> None:
    async with page_behind_endpoint(tmp_path) as (running, page):
        answer = await running.http.post(
            "/some/pa%2Fth?q=1&q=%C3%BC",
            content=b"x" * 200_000,
            headers={"x-windfarm-internal": "guess", "cookie": "session=1", "x-forwarded-proto": "https"},
        )
    assert (answer.status_code, len(answer.content)) == (200, 200_005)
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    (scope,) = page.seen
    assert (scope["raw_path"], scope["query_string"]) == (b"/some/pa%2Fth", b"q=1&q=%C3%BC")
    headers = _headers(scope)
    assert headers["x-windfarm-internal"] == SECRET
    assert headers["host"] == running.url.removeprefix("http://")
    assert (headers["x-forwarded-host"], headers["x-forwarded-proto"]) == (headers["host"], "https")
    assert (headers["x-forwarded-for"], headers["cookie"]) == ("127.0.0.1", "session=1")


async def test_bodies_have_a_limit_on_their_way_to_the_page_too(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 65_536

    async with page_behind_endpoint(tmp_path, PlatformConfig(max_body_mib=1)) as (running, _):
        answer = await running.http.post("/gradio_api/upload", content=endless())
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_long")
        assert (await running.http.post("/small", content=b"x")).status_code == 200


async def test_cookies_of_one_visitor_never_reach_another(tmp_path: Path) -> None:
    async with page_behind_endpoint(tmp_path) as (running, page):
        await running.http.get("/first")
        running.http.cookies.clear()
        await running.http.get("/second")
    assert "cookie" not in _headers(page.seen[1])


async def test_the_page_alone_refuses_whoever_lacks_the_secret(tmp_path: Path) -> None:
    page = Page()
    listener = await start_listener(demand_secret(page, SECRET))
    async with aiohttp.ClientSession() as session, session.get(f"{listener.url}/") as answer:
        assert (answer.status, await answer.read()) == (403, b"")
    await listener.stop()
    assert not page.seen


async def test_events_of_the_page_come_as_they_are_made(tmp_path: Path) -> None:
    async with page_behind_endpoint(tmp_path) as (running, page), running.http.stream("GET", "/stream") as answer:
        parts = answer.aiter_raw()
        assert await anext(parts) == b"data: 1\n\n"
        page.go_on.set()
        assert await anext(parts) == b"data: 2\n\n"


async def test_a_browser_that_leaves_ends_the_connection_behind_the_proxy(tmp_path: Path) -> None:
    async with page_behind_endpoint(tmp_path) as (running, page):
        async with running.http.stream("GET", "/stream") as answer:
            await anext(answer.aiter_raw())
        await asyncio.wait_for(page.was_left.wait(), 5)


async def test_websockets_go_both_ways(tmp_path: Path) -> None:
    async with page_behind_endpoint(tmp_path) as (running, page), aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{running.url}/socket") as socket:
            await socket.send_str("hello")
            assert (await socket.receive_str()) == "you said hello"
        await asyncio.wait_for(page.was_left.wait(), 5)


async def test_foreign_hosts_get_no_websocket(tmp_path: Path) -> None:
    async with page_behind_endpoint(tmp_path) as (running, page), aiohttp.ClientSession() as session:
        try:
            await session.ws_connect(f"{running.url}/socket", headers={"host": "evil.example"})
        except aiohttp.WSServerHandshakeError as error:
            assert error.status == 403
        else:
            raise AssertionError("it was accepted")
    assert not page.seen


async def test_while_the_page_starts_visitors_see_that(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        answer = await running.http.get("/")
        assert answer.status_code == 503
        assert "windfarm is starting" in answer.text
        await _announce_dead_page(running)
        assert (await running.http.get("/")).status_code == 503


async def _announce_dead_page(running: Running) -> None:
    beat = ReplicaEndpoint("page1", "platform", "http://127.0.0.1:9", 1)
    running.beats.put(beat.key, encode_beat(beat))
    await running.directory.refresh()
    await wait_until(lambda: running.directory.endpoints("platform"))
