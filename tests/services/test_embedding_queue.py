"""Overload of the embedding model: its requests wait in a bounded room where keys take turns, as chats do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.config import PlatformConfig, QueuesConfig
from tests.services.harness import EmbeddingCalls, Running, error_of, running_endpoint, wait_until

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


Send = Callable[[httpx.AsyncClient, str], Awaitable[httpx.Response]]


async def embed(http: httpx.AsyncClient, name: str) -> httpx.Response:
    return await http.post("/v1/embeddings", json={"model": "embed", "input": name})


class Clients:
    """Keys by name; each sends requests that say its name, which wait in this room."""

    def __init__(self, running: Running, room: str = "embed", send: Send = embed) -> None:
        self._running = running
        self._room = room
        self._send = send
        self._http: dict[str, httpx.AsyncClient] = {}
        self.tasks: list[asyncio.Task[httpx.Response]] = []

    def ask(self, name: str, send: Send | None = None) -> asyncio.Task[httpx.Response]:
        if name not in self._http:
            owner = self._running.accounts.owner_id()
            assert owner is not None
            headers = {"authorization": f"Bearer {self._running.accounts.create_key(owner, name)}"}
            self._http[name] = httpx.AsyncClient(
                base_url=self._running.url, headers=headers, timeout=60, trust_env=False
            )
        asked = (send or self._send)(self._http[name], name)
        self.tasks.append(asyncio.ensure_future(asked))
        return self.tasks[-1]

    async def until_waiting(self, number: int) -> None:
        async def is_so() -> bool:
            metrics = (await self._running.http.get("/metrics")).text
            return f'windfarm_waiting{{model="{self._room}"}} {number}.0' in metrics

        await wait_until(is_so)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for http in self._http.values():
            await http.aclose()


@asynccontextmanager
async def overloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_waiting: int
) -> AsyncIterator[tuple[Turnstile, Clients]]:
    monkeypatch.setattr("services.endpoint.EMBEDDING_REQUESTS", AT_ONCE)
    turnstile, config = Turnstile(), PlatformConfig(queues=QueuesConfig(max_waiting=max_waiting))
    async with running_endpoint(folder, config=config, embedding=turnstile) as running:
        clients = Clients(running)
        try:
            yield turnstile, clients
        finally:
            await clients.close()


async def test_keys_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=20) as (turnstile, clients):
        for _ in range(PLACES + 6):
            clients.ask("heavy")
        await clients.until_waiting(6)
        assert turnstile.asked == ["heavy"] * PLACES
        for _ in range(2):
            clients.ask("light")
        await clients.until_waiting(8)
        turnstile.let_through(4)
        await wait_until(lambda: len(turnstile.asked) == PLACES + 4)
        assert turnstile.asked[PLACES:].count("light") == 2
        turnstile.let_through(20)
        assert {answer.status_code for answer in await asyncio.gather(*clients.tasks)} == {200}


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
