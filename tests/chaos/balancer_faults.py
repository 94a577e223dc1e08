"""The load balancer before several relays is killed: its streams are cut, never complete; another one takes over."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from cluster.engine import GenerationChunk
from services.haproxy import Haproxy
from services.listener import bind_socket
from tests.chaos.faults import Fault, Heard, Outcome, hear, until
from tests.services.harness import ScriptedEngine, chat_body, words
from tests.services.test_haproxy import front, until_served


def faults(_quick: bool) -> list[Fault]:
    return [Fault("HAProxy", 10, kill_the_balancer, needs="haproxy")]


async def kill_the_balancer(folder: Path) -> Outcome:
    """The time from the kill until a request through its successor is served. In the product it is Serve's health check
    that starts the successor."""
    engines = [ScriptedEngine(GenerationChunk((9,), "Hel"), asyncio.Event()), ScriptedEngine(*words("ok"))]
    async with front(folder, *engines) as before:
        await until_served(before.http)
        heard = [Heard(), Heard()]
        asked = [asyncio.create_task(hear(before.http, chat_body(stream=True), each)) for each in heard]
        await until(lambda: any("Hel" in each.body for each in heard) and any(each.is_complete for each in heard))
        os.kill(before.haproxy.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        await asyncio.gather(*asked)
        await until(lambda: not before.haproxy.is_running)
        before.haproxy.stop()  # as the end of its replica does: the socket is closed
        port = before.http.base_url.port
        assert port is not None
        successor = Haproxy(bind_socket("127.0.0.1", port), before.servers()[1:], folder)
        try:
            await until_served(before.http)
            seconds = time.monotonic() - killed_at
            answer = await hear(before.http, chat_body(stream=True))
        finally:
            await asyncio.to_thread(successor.stop)
    (cut,) = (each for each in heard if not each.is_complete)
    problem = None
    if not cut.was_cut or "[DONE]" in cut.body:
        problem = f"the stream was not cut: {cut.body!r}"
    elif not answer.is_complete:
        problem = f"the successor does not serve: {answer.status} {answer.body!r}"
    return Outcome(seconds, "the connection ends; none until the next one has started", problem)
