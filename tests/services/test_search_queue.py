"""Overload of the search: whichever way searches come, they wait in one bounded room where keys take turns."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.config import PlatformConfig, QueuesConfig
from services.model_queues import SEARCHES, TUNINGS
from tests.services.harness import ScriptedEngine, chat_body, error_of, wait_until, words
from tests.services.knowledge_endpoint import knowledge_endpoint
from tests.services.waiting_rooms import Clients, assert_keys_take_turns

AT_ONCE = 2
PLACES = 3
"""One search more than run may be on its way."""
CALL = '{"query": "what the model asks"}'
"""All that the model says: the arguments of a forced call."""


@dataclass
class Overloaded:
    """A store that lets searches and tunings through one by one, and all ways to it."""

    store_id: str = ""
    asked: list[str] = field(default_factory=list)
    num_tunings: int = 0
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def let_through(self, number: int) -> None:
        for _ in range(number):
            self.gate.release()

    async def collection(self, http: httpx.AsyncClient, name: str) -> httpx.Response:
        return await http.post(f"/v1/collections/{self.store_id}/search", json={"query": name})

    async def vector_store(self, http: httpx.AsyncClient, name: str) -> httpx.Response:
        return await http.post(f"/v1/vector_stores/{self.store_id}/search", json={"query": [name, f"{name} again"]})

    async def assistant(self, http: httpx.AsyncClient, name: str) -> httpx.Response:
        params = {"name": "search", "arguments": {"query": name, "collections": [self.store_id]}}
        return await http.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})

    async def chat(self, http: httpx.AsyncClient, name: str) -> httpx.Response:
        asked = [{"role": "user", "content": name}]
        body = chat_body(messages=asked, knowledge={"collections": [self.store_id]})
        return await http.post("/v1/chat/completions", json=body)

    async def model(self, http: httpx.AsyncClient, _name: str) -> httpx.Response:
        forced = {"type": "function", "function": {"name": "knowledge_search"}}
        search = {"windfarm_tools": ["knowledge_search"], "tool_choice": forced}
        body = chat_body(knowledge={"collections": [self.store_id]}, **search)
        return await http.post("/v1/chat/completions", json=body)

    async def tuning(self, http: httpx.AsyncClient, _name: str) -> httpx.Response:
        return await http.post(f"/v1/collections/{self.store_id}/tune", json={})


@asynccontextmanager
async def overloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_waiting: int
) -> AsyncIterator[tuple[Overloaded, Clients]]:
    monkeypatch.setattr("services.endpoint.SEARCH_REQUESTS", AT_ONCE)
    config = PlatformConfig(queues=QueuesConfig(max_waiting=max_waiting))
    store = Overloaded()
    async with knowledge_endpoint(folder, ScriptedEngine(*words(CALL)), config=config) as windfarm:
        search = windfarm.service.search

        async def search_in_turn(collections: Any, query: str, *args: Any, **kwargs: Any) -> Any:
            store.asked.append(query)
            await store.gate.acquire()
            return await search(collections, query, *args, **kwargs)

        async def tune_in_turn(*_args: Any, **_kwargs: Any) -> Any:
            store.num_tunings += 1
            await store.gate.acquire()
            return {}

        monkeypatch.setattr(windfarm.service, "search", search_in_turn)
        monkeypatch.setattr(windfarm.service, "tune", tune_in_turn)
        store.store_id = (await windfarm.http.post("/v1/vector_stores", json={"name": "rules"})).json()["id"]
        clients = Clients(windfarm.running, SEARCHES, store.collection)
        try:
            yield store, clients
        finally:
            await clients.close()


async def test_keys_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=20) as (store, clients):
        await assert_keys_take_turns(store, clients, PLACES)


async def test_a_full_room_answers_every_way_of_searching_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=1) as (store, clients):
        for _ in range(PLACES + 1):
            clients.ask("heavy")
        await clients.until_waiting(1)
        for way in (store.collection, store.vector_store, store.chat, store.model):
            own_doing = await clients.ask("heavy", way)
            assert (own_doing.status_code, error_of(own_doing)["code"]) == (429, "too_many_waiting")
            assert int(own_doing.headers["retry-after"]) >= 1
            everybody = await clients.ask("light", way)
            assert (everybody.status_code, error_of(everybody)["code"]) == (503, "overloaded")
            assert "The search is overloaded" in everybody.text
        told = (await clients.ask("light", store.assistant)).json()["result"]
        assert told["isError"] and "The search is overloaded" in told["content"][0]["text"]
        store.let_through(20)
        assert {answer.status_code for answer in await asyncio.gather(*clients.tasks[: PLACES + 1])} == {200}


async def test_whoever_leaves_while_it_waits_is_not_searched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=8) as (store, clients):
        for way in (store.collection, store.vector_store, store.assistant):
            clients.ask("first", way)
        await wait_until(lambda: len(store.asked) == PLACES)
        ways = (store.collection, store.vector_store, store.assistant, store.chat, store.model)
        gone = [clients.ask("gone", way) for way in ways]
        await clients.until_waiting(len(ways))
        for task in gone:
            task.cancel()
        await clients.until_waiting(0)
        store.let_through(20)
        answers = await asyncio.gather(*clients.tasks[:PLACES])
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(store.asked) == ["first"] * PLACES + ["first again"]


async def test_what_a_chat_and_its_model_search_for_has_its_turn_among_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=8) as (store, clients):
        for _ in range(PLACES + 2):
            clients.ask("heavy")
        await clients.until_waiting(2)
        clients.ask("light", store.chat)
        await clients.until_waiting(3)
        clients.ask("model", store.model)
        await clients.until_waiting(4)
        store.let_through(3)
        await wait_until(lambda: len(store.asked) == PLACES + 3)
        assert store.asked[PLACES:] == ["heavy", "light", "what the model asks"]
        store.let_through(20)
        assert {answer.status_code for answer in await asyncio.gather(*clients.tasks)} == {200}


async def test_tunings_wait_for_each_other_and_not_for_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with overloaded(tmp_path, monkeypatch, max_waiting=1) as (store, clients):
        tuners = Clients(clients.running, TUNINGS, store.tuning)
        for _ in range(2):  # one and the next
            tuners.ask("heavy")
        await wait_until(lambda: store.num_tunings == 2)
        waiting = tuners.ask("heavy")
        await tuners.until_waiting(1)
        assert error_of(await tuners.ask("heavy"))["code"] == "too_many_waiting"
        everybody = await tuners.ask("light")
        assert everybody.status_code == 503 and "The tuning is overloaded" in everybody.text
        clients.ask("searcher")
        await wait_until(lambda: store.asked == ["searcher"])
        waiting.cancel()
        await tuners.until_waiting(0)
        store.let_through(20)
        assert {answer.status_code for answer in await asyncio.gather(*tuners.tasks[:2], *clients.tasks)} == {200}
        await tuners.close()
        assert store.num_tunings == 2
