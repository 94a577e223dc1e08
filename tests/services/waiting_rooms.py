"""Clients with keys of their own that wait in a bounded room of the endpoint, and the turns that they take there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import httpx

from tests.services.harness import Running, wait_until

Send = Callable[[httpx.AsyncClient, str], Awaitable[httpx.Response]]


class Turnstile(Protocol):
    """Every request waits there until it is let through."""

    asked: list[str]
    """Who has come so far, in order."""

    def let_through(self, number: int) -> None: ...


class Clients:
    """Keys by name. `send` makes a request that says the name; its requests wait in the room of this model."""

    def __init__(self, running: Running, room: str, send: Send) -> None:
        self.running = running
        self._room = room
        self._send = send
        self._http: dict[str, httpx.AsyncClient] = {}
        self.tasks: list[asyncio.Task[httpx.Response]] = []

    def ask(self, name: str, send: Send | None = None) -> asyncio.Task[httpx.Response]:
        if name not in self._http:
            owner = self.running.accounts.owner_id()
            assert owner is not None
            headers = {"authorization": f"Bearer {self.running.accounts.create_key(owner, name)}"}
            self._http[name] = httpx.AsyncClient(
                base_url=self.running.url, headers=headers, timeout=60, trust_env=False
            )
        self.tasks.append(asyncio.ensure_future((send or self._send)(self._http[name], name)))
        return self.tasks[-1]

    async def until_waiting(self, number: int) -> None:
        async def is_so() -> bool:
            metrics = (await self.running.http.get("/metrics")).text
            return f'windfarm_waiting{{model="{self._room}"}} {number}.0' in metrics

        await wait_until(is_so)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for http in self._http.values():
            await http.aclose()


async def assert_keys_take_turns(turnstile: Turnstile, clients: Clients, places: int) -> None:
    """In a room of 8 at least, behind these places."""
    for _ in range(places + 6):
        clients.ask("heavy")
    await clients.until_waiting(6)
    assert turnstile.asked == ["heavy"] * places
    for _ in range(2):
        clients.ask("light")
    await clients.until_waiting(8)
    turnstile.let_through(4)
    await wait_until(lambda: len(turnstile.asked) == places + 4)
    assert turnstile.asked[places:].count("light") == 2
    turnstile.let_through(places + 8)
    assert {answer.status_code for answer in await asyncio.gather(*clients.tasks)} == {200}
