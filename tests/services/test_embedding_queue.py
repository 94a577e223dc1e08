"""Overload of the embedding model: its requests wait in a bounded room where keys take turns, as chats do."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.config import PlatformConfig, QueuesConfig
from tests.services.harness import EmbeddingCalls, error_of, running_endpoint, wait_until
from tests.services.waiting_rooms import Clients, assert_keys_take_turns

AT_ONCE = 2
PLACES = 3
"""One request more than run may be on its way."""


class Turnstile(EmbeddingCalls):
    """Every request waits until it is let through; notes their texts, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._gate = asyncio.Semaphore(0)

    def let_through(self, number: int = 1) -> None:
        for _ in range(number):
            self._gate.release()

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(args[0][0])
        await self._gate.acquire()
        return await super().call(method, *args, **kwargs)


async def embed(http: httpx.AsyncClient, name: str) -> httpx.Response:
    return await http.post("/v1/embeddings", json={"model": "embed", "input": name})


@asynccontextmanager
async def overloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_waiting: int
) -> AsyncIterator[tuple[Turnstile, Clients]]:
    monkeypatch.setattr("services.endpoint.EMBEDDING_REQUESTS", AT_ONCE)
    turnstile, config = Turnstile(), PlatformConfig(queues=QueuesConfig(max_waiting=max_waiting))
    async with running_endpoint(folder, config=config, embedding=turnstile) as running:
        clients = Clients(running, "embed", embed)
        try:
            yield turnstile, clients
        finally:
            await clients.close()


async def test_keys_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=20) as (turnstile, clients):
        await assert_keys_take_turns(turnstile, clients, PLACES)


async def test_a_full_room_answers_at_once_with_the_time_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=4) as (turnstile, clients):
        for _ in range(PLACES + 4):
            clients.ask("heavy")
        await clients.until_waiting(4)
        own_doing = await clients.ask("heavy")
        assert (own_doing.status_code, error_of(own_doing)["code"]) == (429, "too_many_waiting")
        assert int(own_doing.headers["retry-after"]) >= 1
        for number in range(3):  # the room fills with keys of one request each; heavy gives way
            clients.ask(f"light {number}")
            await wait_until(lambda number=number: sum(task.done() for task in clients.tasks) == number + 2)
        refused = [task.result() for task in clients.tasks if task.done()]
        assert [answer.status_code for answer in refused] == [429] * 4
        everybody = await clients.ask("one more")
        assert (everybody.status_code, error_of(everybody)["code"]) == (503, "overloaded")
        assert int(everybody.headers["retry-after"]) >= 1
        turnstile.let_through(20)
        statuses = [answer.status_code for answer in await asyncio.gather(*clients.tasks)]
    assert statuses.count(200) == PLACES + 4


async def test_who_leaves_while_it_waits_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=4) as (turnstile, clients):
        for _ in range(PLACES):
            clients.ask("first")
        await wait_until(lambda: len(turnstile.asked) == PLACES)
        gone = clients.ask("gone")
        await clients.until_waiting(1)
        gone.cancel()
        await clients.until_waiting(0)
        turnstile.let_through(20)
        answers = await asyncio.gather(*clients.tasks[:PLACES])
    assert {answer.status_code for answer in answers} == {200}
    assert turnstile.asked == ["first"] * PLACES
