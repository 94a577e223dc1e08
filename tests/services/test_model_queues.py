"""Overload at the public endpoint: who waits, who is refused and how, and that nobody is kept out by one heavy key."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.engine import GenerationChunk, GenerationRequest, Usage
from services.config import ChatConfig, PlatformConfig, QueuesConfig
from services.errors import ApiError
from services.model_queues import ModelQueues
from tests.services.harness import ScriptedEngine, chat_body, error_of, events_of, running_endpoint, wait_until
from tests.services.waiting_rooms import Clients

TWO_SLOTS = 2
PLACES = 3
"""A model with two slots lets one request more begin."""


class Turnstile(ScriptedEngine):
    """Every answer waits until it is let through; notes whose questions it got, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.info = type(self.info)("tiny", "scripted", max_context=64, max_concurrency=TWO_SLOTS)
        self.asked: list[str] = []
        self._gate = asyncio.Semaphore(0)

    def let_through(self, number: int = 1) -> None:
        for _ in range(number):
            self._gate.release()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        assert request.messages is not None
        self.asked.append(request.messages[-1]["content"])
        await self._gate.acquire()
        yield GenerationChunk((1,), "ok")
        yield GenerationChunk(finish_reason="stop", usage=Usage(3, 1))


async def chat(http: httpx.AsyncClient, name: str, **fields: Any) -> httpx.Response:
    """Asks with the key's name as the question."""
    body = chat_body(**fields) | {"messages": [{"role": "user", "content": name}]}
    return await http.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def overloaded(folder: Path, **queues: int) -> AsyncIterator[tuple[Turnstile, Clients]]:
    engine = Turnstile()
    config = PlatformConfig(queues=QueuesConfig(**queues), chat=ChatConfig(keep_alive_s=0.05))
    async with running_endpoint(folder, engine, config=config) as running:
        clients = Clients(running, "tiny", chat)
        try:
            yield engine, clients
        finally:
            await clients.close()


async def test_as_many_begin_as_have_room_and_the_others_wait_their_turn(tmp_path: Path) -> None:
    async with overloaded(tmp_path) as (engine, clients):
        for _ in range(6):
            clients.ask("a")
        await clients.until_waiting(6 - PLACES)
        await wait_until(lambda: len(engine.asked) == PLACES)
        engine.let_through(6)
        answers = await asyncio.gather(*clients.tasks)
        await clients.until_waiting(0)
    assert {answer.status_code for answer in answers} == {200}


async def test_one_heavy_key_does_not_keep_others_waiting(tmp_path: Path) -> None:
    async with overloaded(tmp_path) as (engine, clients):
        for _ in range(12):
            clients.ask("heavy")
        await clients.until_waiting(12 - PLACES)
        light = [clients.ask("light") for _ in range(2)]
        await clients.until_waiting(12 - PLACES + 2)
        for number in range(1, 7):
            engine.let_through()
            await wait_until(lambda number=number: len(engine.asked) == PLACES + number)
        assert engine.asked[PLACES:].count("light") == 2
        engine.let_through(6)
        assert {(await answer).status_code for answer in light} == {200}


async def test_a_full_room_answers_at_once_with_the_time_to_come_back(tmp_path: Path) -> None:
    async with overloaded(tmp_path, max_waiting=2) as (_, clients):
        for number, name in enumerate(("a", "b", "c", "d", "e"), start=1):
            clients.ask(name)
            await clients.until_waiting(max(0, number - PLACES))
        refused = await clients.ask("f")
        own = [await clients.ask("d", partial(chat, stream=stream)) for stream in (False, True)]
    assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert {answer.status_code for answer in own} == {503}  # it has no more waiting than the others


async def test_whoever_fills_the_room_alone_is_told_so_and_gives_way(tmp_path: Path) -> None:
    async with overloaded(tmp_path, max_waiting=3) as (engine, clients):
        heavy = [clients.ask("heavy") for _ in range(PLACES + 3)]
        await clients.until_waiting(3)
        refused = await clients.ask("heavy")
        assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_waiting")
        assert int(refused.headers["retry-after"]) >= 1
        light = clients.ask("light")
        await wait_until(lambda: any(task.done() for task in heavy))
        engine.let_through(9)
        assert (await light).status_code == 200
        codes = sorted([(await answer).status_code for answer in heavy])
    assert codes == [200] * (PLACES + 2) + [429]


async def test_a_stream_that_gives_way_after_comments_ends_with_an_error_event(tmp_path: Path) -> None:
    async with overloaded(tmp_path, max_waiting=2) as (engine, clients):
        heavy = [clients.ask("heavy", partial(chat, stream=True)) for _ in range(PLACES + 2)]
        await clients.until_waiting(2)
        await asyncio.sleep(0.2)  # comments go out
        clients.ask("light")
        await wait_until(lambda: any(task.done() for task in heavy))
        (pushed,) = [task.result() for task in heavy if task.done()]
        engine.let_through(9)
    assert ": keep-alive" in pushed.text
    assert events_of(pushed.text)[-1]["error"]["code"] == "too_many_waiting"
    assert "[DONE]" not in pushed.text


async def test_flex_requests_wait_for_all_others(tmp_path: Path) -> None:
    async with overloaded(tmp_path) as (engine, clients):
        for _ in range(PLACES):
            clients.ask("a")
        await wait_until(lambda: len(engine.asked) == PLACES)
        clients.ask("later", partial(chat, service_tier="flex"))
        await clients.until_waiting(1)
        for _ in range(3):
            clients.ask("b")
        await clients.until_waiting(4)
        engine.let_through(3)
        await wait_until(lambda: len(engine.asked) == PLACES + 3)
        assert engine.asked[PLACES:] == ["b", "b", "b"]
        engine.let_through(4)
        assert {(await task).status_code for task in clients.tasks} == {200}
    assert engine.asked[-1] == "later"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_the_queue_frees_its_place(tmp_path: Path, stream: bool) -> None:
    async with overloaded(tmp_path) as (engine, clients):
        for _ in range(PLACES):
            clients.ask("a", partial(chat, stream=stream))
        await wait_until(lambda: len(engine.asked) == PLACES)
        gone = clients.ask("gone", partial(chat, stream=stream))
        await clients.until_waiting(1)
        gone.cancel()
        await clients.until_waiting(0)
        clients.ask("b", partial(chat, stream=stream))
        engine.let_through(PLACES + 1)
        await wait_until(lambda: "b" in engine.asked)
    assert "gone" not in engine.asked


async def test_stories_and_completions_wait_too(tmp_path: Path) -> None:
    async with overloaded(tmp_path) as (engine, clients):
        for _ in range(PLACES):
            clients.ask("a")
        await wait_until(lambda: len(engine.asked) == PLACES)
        for stream in (True, False):
            clients.ask("story", partial(chat, windfarm_tools=["calculator"], stream=stream))
        await clients.until_waiting(2)
        assert "story" not in engine.asked
        engine.let_through(PLACES + 2)
        assert {(await task).status_code for task in clients.tasks} == {200}


class Models:
    """What the queues ask of the models."""

    def __init__(self, slots: int, *, starts_on_demand: bool = False) -> None:
        self.slots = slots
        self.starts_on_demand = starts_on_demand

    def num_slots(self, model: str) -> int:
        return self.slots

    def sleeps(self, model: str) -> bool:
        return self.starts_on_demand and not self.slots

    def why_not_ready(self, model: str) -> str:
        return f"Ray Serve says that {model} has no room."


async def test_new_replicas_are_used_by_those_who_wait_already() -> None:
    models = Models(1)
    queues = ModelQueues(QueuesConfig(), models)
    begun: list[str] = []

    async def ask(key: str) -> None:
        async with queues.place("tiny", key, "default", 1):
            begun.append(key)
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(ask(f"k{number}")) for number in range(8)]
    await wait_until(lambda: len(begun) == 2)
    models.slots = 5
    await wait_until(lambda: len(begun) == 6)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert queues.sizes() == {"tiny": (0, 0)}


async def test_a_request_that_is_called_while_it_leaves_gives_its_place_on() -> None:
    queues = ModelQueues(QueuesConfig(max_waiting=1), Models(1))

    async def hold(end: asyncio.Event) -> None:
        async with queues.place("tiny", "a", "default", 1):
            await end.wait()

    ends = [asyncio.Event() for _ in range(3)]
    tasks = [asyncio.create_task(hold(end)) for end in ends]
    await wait_until(lambda: queues.sizes().get("tiny") == (2, 1))
    with pytest.raises(ApiError, match="Try again in"):
        await hold(ends[0])
    ends[0].set()
    await asyncio.sleep(0)  # the first one leaves its place ...
    tasks[2].cancel()  # ... to one whose client goes at this moment
    ends[1].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert queues.sizes() == {"tiny": (0, 0)}
