"""The public port is lent: who serves it may be stopped or killed, and no connection that comes meanwhile is lost."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.config import Environment
from services.listener import ListenError, bind_socket, start_listener_on
from services.public_port import PortLender, public_socket
from tests.product import ROOT, free_port

HOST = "127.0.0.1"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    lender = PortLender(tmp_path / "ports.sock")
    yield Environment(home=tmp_path, database_url="sqlite://", internal_secret="s", ports=lender.path)
    lender.close()


async def test_what_is_stopped_before_its_successor_begins_fails_no_request(environment: Environment) -> None:
    port, is_over, num_answers = free_port(), asyncio.Event(), 0
    listener = await start_listener_on([public_socket(environment, HOST, port)], hello)

    async def ask() -> None:
        nonlocal num_answers
        while not is_over.is_set():
            async with aiohttp.ClientSession() as session, session.get(listener.url) as answer:
                assert await answer.text() == "hello"
            num_answers += 1

    clients = [asyncio.create_task(ask()) for _ in range(8)]
    try:
        for _ in range(20):
            wanted = num_answers + 20
            while num_answers < wanted and not any(client.done() for client in clients):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await listener.stop(drain_s=5)
            listener = await start_listener_on([public_socket(environment, HOST, port)], hello)
    finally:
        is_over.set()
        await asyncio.gather(*clients)
        await listener.stop()


async def test_a_connection_to_a_killed_process_that_had_not_taken_it_waits_for_the_next(
    environment: Environment,
) -> None:
    port = free_port()
    with connected_to_a_killed_one(environment, port) as waiting:
        listener = await start_listener_on([public_socket(environment, HOST, port)], hello)
        waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert (await asyncio.to_thread(waiting.recv, 100)).startswith(b"HTTP/1.1 200 OK")
    await listener.stop()


def connected_to_a_killed_one(environment: Environment, port: int) -> socket.socket:
    """A connection that was made while another process had the port, and that it never took."""
    program = (
        "import sys, time; from services.config import Environment\n"
        "from services.public_port import public_socket\n"
        "environment = Environment(home='/', database_url='sqlite://', internal_secret='s', ports=sys.argv[1])\n"
        "public_socket(environment, '127.0.0.1', int(sys.argv[2])).listen(); print('there', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(environment.ports), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as idle:
        assert idle.stdout is not None
        assert idle.stdout.readline() == "there\n"
        waiting = socket.create_connection((HOST, port), timeout=10)
        idle.send_signal(signal.SIGKILL)
    return waiting


async def test_a_taken_port_is_told_to_who_asks(environment: Environment) -> None:
    with bind_socket(HOST, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=rf"{HOST}:{port}.*Choose another port"):
            public_socket(environment, HOST, port)
    public_socket(environment, HOST, port).close()


def test_with_the_lender_the_port_is_given_up(tmp_path: Path) -> None:
    lender = PortLender(tmp_path / "ports.sock")
    assert (tmp_path / "ports.sock").stat().st_mode & 0o777 == 0o600
    environment = Environment(home=tmp_path, database_url="sqlite://", internal_secret="s", ports=lender.path)
    port = free_port()
    with public_socket(environment, HOST, port) as lent:
        lent.listen()
    socket.create_connection((HOST, port)).close()
    with pytest.raises(ListenError):
        bind_socket(HOST, port)
    lender.close()
    bind_socket(HOST, port).close()


def test_without_a_lender_several_processes_may_open_the_port_themselves(tmp_path: Path) -> None:
    environment = Environment(home=tmp_path, database_url="sqlite://", internal_secret="s")
    with public_socket(environment, HOST, 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with public_socket(environment, HOST, port) as second:
            second.listen()
