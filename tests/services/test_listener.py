"""The listener answers, shares a port when asked, refuses a taken one, and drains when it stops."""

import asyncio

import aiohttp
import pytest

from services.listener import ListenError, start_listener
from tests.services.harness import wait_until


async def _hello(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def test_an_ephemeral_port_is_known_and_answers_without_naming_the_server() -> None:
    listener = await start_listener(_hello)
    async with aiohttp.ClientSession() as session, session.get(listener.url) as answer:
        assert await answer.text() == "hello"
        assert "server" not in answer.headers
    await listener.stop()
    assert not listener.is_running


async def test_a_taken_port_is_a_clear_error() -> None:
    listener = await start_listener(_hello)
    with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{listener.port}.*Choose another port"):
        await start_listener(_hello, port=listener.port)
    await listener.stop()


async def test_stopping_lets_a_running_request_finish() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(scope, receive, send) -> None:
        if scope["path"] == "/slow":
            entered.set()
            await leave.wait()
        await _hello(scope, receive, send)

    listener = await start_listener(slow)
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.get(f"{listener.url}/slow"))
        await entered.wait()
        stopping = asyncio.create_task(listener.stop(drain_s=30))
        with pytest.raises(aiohttp.ClientConnectionError):
            while True:  # new connections are refused as soon as the listener noticed
                async with aiohttp.ClientSession() as other, other.get(listener.url):
                    pass
        leave.set()
        answer = await request
        assert await answer.text() == "hello"
        answer.release()
        await stopping


async def test_a_connection_that_was_just_taken_may_still_send_its_request() -> None:
    listener = await start_listener(_hello)
    reader, writer = await asyncio.open_connection(listener.host, listener.port)
    await wait_until(lambda: listener.num_connections == 1)
    stopping = asyncio.create_task(listener.stop(drain_s=30))
    await asyncio.sleep(0.1)
    writer.write(b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await stopping
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"hello\r\n0\r\n\r\n")


async def test_a_connection_that_says_nothing_does_not_hold_up_the_stop() -> None:
    listener = await start_listener(_hello)
    _, writer = await asyncio.open_connection(listener.host, listener.port)
    await wait_until(lambda: listener.num_connections == 1)
    await asyncio.wait_for(listener.stop(drain_s=60), 30)
    writer.close()


async def test_stopping_without_drain_ends_a_request_that_would_never_finish() -> None:
    entered = asyncio.Event()

    async def endless(scope, receive, send) -> None:
        entered.set()
        await asyncio.Event().wait()

    listener = await start_listener(endless)
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.get(listener.url))
        await entered.wait()
        await listener.stop()
        with pytest.raises(aiohttp.ClientError):
            answer = await request
            answer.raise_for_status()


async def test_an_app_whose_own_start_fails_is_an_error_and_not_the_end_of_the_process() -> None:
    async def broken(scope, receive, send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.raises(RuntimeError, match="start-up failed"):
        await start_listener(broken, lifespan=True)
