"""One answer and the end of its replica: what goes on, what is sent again, and what ends with an error."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.engine import GenerationRequest, SamplingParams
from services.config import ChatConfig, PlatformConfig, StreamsConfig
from services.limits import Limits
from services.model_status import ApplicationState
from tests.chaos.hash_engine import HashEngine, whole_answer
from tests.chaos.replicas import FAULTS, Fleet, Replica
from tests.chaos.streams import Said, num_moves, read_events
from tests.services.harness import Running, error_of, events_of, running_endpoint, wait_until

STATES = {"llm-tiny": ApplicationState("llm-tiny", "DEPLOYING")}
NUM_TOKENS, LONG = 100, 400


def _asks_for_a_long_answer(messages: list[dict[str, str]]) -> bool:
    request = GenerationRequest("", messages=messages, sampling=SamplingParams(max_tokens=LONG))
    return whole_answer(request)[2].finish_reason == "length"


QUESTION = next(
    messages
    for number in range(1000)
    if _asks_for_a_long_answer(messages := [{"role": "user", "content": f"Question {number}"}])
)
"""Its answer goes on to the limit: there is time for a fault."""


@asynccontextmanager
async def fleet_of(
    folder: Path, size: int = 2, pace_s: float = 0.01, **streams: Any
) -> AsyncIterator[tuple[Running, Fleet]]:
    config = PlatformConfig(
        streams=StreamsConfig(**({"stall_s": 0.3, "move_wait_s": 0.5} | streams)), chat=ChatConfig(keep_alive_s=0.05)
    )
    async with running_endpoint(folder, config=config, states=STATES) as running:
        fleet = Fleet(running, pace_s=pace_s)
        try:
            for _ in range(size):
                await fleet.grow()
            yield running, fleet
        finally:
            await fleet.close()


def body_of(**fields: Any) -> dict[str, Any]:
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": "tiny", "messages": QUESTION} | sampling | fields


def expected(**sampling: Any) -> Said:
    text, _, last = whole_answer(
        GenerationRequest("", messages=QUESTION, sampling=SamplingParams(**({"max_tokens": NUM_TOKENS} | sampling)))
    )
    assert last.usage is not None
    usage = {"prompt_tokens": last.usage.num_prompt_tokens, "completion_tokens": last.usage.num_completion_tokens}
    return Said(text, last.finish_reason, usage, [])


def busy(fleet: Fleet) -> Replica:
    return next(replica for replica in fleet.alive if replica.engine.load[0])


def has_tokens(fleet: Fleet, number: int = 3) -> bool:
    return sum(replica.engine.num_tokens for replica in fleet.alive) >= number


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_stream_goes_on_at_another_replica(tmp_path: Path, fault: str) -> None:
    async with fleet_of(tmp_path) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        await fleet.lose(busy(fleet), fault)
        answer = await asked
        moves = await num_moves(running)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert read_events(answer.text) == expected()
    assert moves >= 1  # more often where a busy machine keeps a replica silent for as long as a hang lasts


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_answer_that_is_not_streamed_goes_on_too(tmp_path: Path, fault: str) -> None:
    async with fleet_of(tmp_path) as (running, fleet):
        asked = asyncio.create_task(
            running.http.post("/v1/chat/completions", json=body_of() | {"stream": False, "stream_options": None})
        )
        await wait_until(lambda: has_tokens(fleet))
        await fleet.lose(busy(fleet), fault)
        answer = (await asked).json()
    assert answer["choices"][0]["message"]["content"] == expected().text
    assert answer["usage"]["completion_tokens"] == expected().usage["completion_tokens"]


async def test_what_had_no_token_yet_is_sent_to_another_replica_as_it_was(tmp_path: Path) -> None:
    async with fleet_of(tmp_path) as (running, fleet):
        for replica in fleet.alive:
            replica.engine.hang()
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: any(replica.engine.load[0] for replica in fleet.alive))
        lost = busy(fleet)
        fleet.alive[1 - fleet.alive.index(lost)].engine._runs.set()
        await fleet.lose(lost, "kill")
        assert read_events((await asked).text) == expected()


async def test_without_another_replica_the_stream_ends_with_an_error_and_never_done(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=1) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        await fleet.lose(fleet.alive[0], "kill")
        answer = await asked
    assert events_of(answer.text)[-1]["error"]["code"] == "stream_lost"
    assert "[DONE]" not in answer.text


async def test_a_stream_waits_for_a_replica_that_restarts_and_is_kept_alive_meanwhile(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=1, move_wait_s=10) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        await fleet.lose(fleet.alive[0], "kill")
        await asyncio.sleep(0.4)
        assert not asked.done()
        await fleet.grow()
        answer = await asked
    assert read_events(answer.text) == expected()
    assert ": keep-alive" in answer.text


async def test_a_request_that_ends_replicas_ends_only_as_many_as_it_may(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=5, max_moves=2, pace_s=0.02) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of(max_tokens=LONG)))
        for num_lost in range(1, 4):
            await wait_until(lambda: asked.done() or any(replica.engine.num_tokens for replica in fleet.alive))
            assert not asked.done(), num_lost
            await fleet.lose(busy(fleet), "die")
        answer = await asked
        assert len(fleet.alive) == 2
    error = events_of(answer.text)[-1]["error"]
    assert "3 replicas were lost while they worked on it" in error["message"]
    assert "[DONE]" not in answer.text


async def test_an_answer_bound_to_a_grammar_ends_with_an_error_that_says_why(tmp_path: Path) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    async with fleet_of(tmp_path) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of(response_format=schema)))
        await wait_until(lambda: has_tokens(fleet))
        await fleet.lose(busy(fleet), "kill")
        answer = await asked
    error = events_of(answer.text)[-1]["error"]
    assert error["code"] == "stream_lost"
    assert "bound to a grammar" in error["message"]
    assert "[DONE]" not in answer.text


async def test_an_engine_that_tells_no_token_ids_cannot_go_on(tmp_path: Path) -> None:
    class Remote(HashEngine):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[Any]:
            async for chunk in super().generate(request):
                yield type(chunk)((), chunk.text, None, chunk.finish_reason, chunk.usage)

    async with fleet_of(tmp_path, size=0) as (running, _):
        engines = [Remote(pace_s=0.02) for _ in range(2)]
        for number, engine in enumerate(engines):
            await running.add_model(engine, replica_id=f"remote{number}")
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: any(engine.num_tokens > 3 for engine in engines))
        next(engine for engine in engines if engine.num_tokens).die()
        answer = await asked
    assert "tells no token ids" in events_of(answer.text)[-1]["error"]["message"]


async def test_a_stream_goes_on_only_where_its_token_ids_mean_the_same(tmp_path: Path) -> None:
    """Its model was changed meanwhile: most replicas have other weights by now."""
    async with fleet_of(tmp_path, size=0) as (running, fleet):
        first = await fleet.grow(identity="old")
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        changed = [await fleet.grow(identity="new") for _ in range(4)]
        alike = await fleet.grow(identity="old")
        await fleet.lose(first, "kill")
        answer = await asked
    assert read_events(answer.text) == expected()
    assert alike.engine.num_tokens
    assert [replica.engine.num_tokens for replica in changed] == [0] * 4


@pytest.mark.parametrize(("fault", "stream"), [("kill", True), ("drain", False)])
async def test_where_all_replicas_serve_another_model_the_answer_ends_with_an_error_that_says_so(
    tmp_path: Path, fault: str, stream: bool
) -> None:
    async with fleet_of(tmp_path, size=0, move_wait_s=30) as (running, fleet):
        first = await fleet.grow(identity="old")
        body = body_of() if stream else body_of(stream=False) | {"stream_options": None}
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body))
        await wait_until(lambda: has_tokens(fleet))
        changed = await fleet.grow(identity="new")
        await fleet.lose(first, fault)
        answer = await asked
        again = await running.http.post("/v1/chat/completions", json=body_of())
    error = events_of(answer.text)[-1]["error"] if stream else error_of(answer)
    assert error["code"] == "stream_lost"
    assert "other weights or another tokenizer" in error["message"]
    assert "[DONE]" not in answer.text
    assert changed.engine.num_tokens == expected().usage["completion_tokens"]
    assert read_events(again.text) == expected()


async def test_a_hang_is_waited_for_where_only_another_model_could_take_over(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=0, stall_s=0.1) as (running, fleet):
        engine = (await fleet.grow(identity="old")).engine
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        await fleet.grow(identity="new")
        engine.hang()
        await asyncio.sleep(0.4)
        engine._runs.set()
        assert read_events((await asked).text) == expected()


async def test_a_hang_with_nowhere_to_go_is_waited_for(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=1, stall_s=0.1) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        engine = fleet.alive[0].engine
        engine.hang()
        await asyncio.sleep(0.4)
        engine._runs.set()
        assert read_events((await asked).text) == expected()


async def test_a_replica_that_was_only_silent_is_the_last_resort(tmp_path: Path) -> None:
    """A machine under load gives no token for a while; that is no reason to end the stream when the others are gone."""
    async with fleet_of(tmp_path, move_wait_s=2.5) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        slow = busy(fleet)
        (other,) = {*fleet.alive} - {slow}
        slow.engine.hang()
        await wait_until(lambda: other.engine.num_tokens > 3)
        slow.engine._runs.set()
        await fleet.lose(other, "kill")
        answer = await asked
    assert answer.text.endswith("data: [DONE]\n\n"), answer.text[-300:]
    assert read_events(answer.text) == expected()


async def test_a_client_that_reads_slowly_makes_no_replica_suspect(tmp_path: Path) -> None:
    """The endpoint cannot write for longer than the limit; the replica is as well as before."""
    async with fleet_of(tmp_path, stall_s=0.2, pace_s=0.0) as (running, _):
        fields = {"max_tokens": 3000, "logprobs": True, "top_logprobs": 20}
        async with running.http.stream("POST", "/v1/chat/completions", json=body_of(**fields)) as answer:
            parts = answer.aiter_raw(64)
            text = (await anext(parts)).decode()
            await asyncio.sleep(1.0)
            text += "".join([part.decode("utf-8", "surrogateescape") async for part in parts])
        metrics = (await running.http.get("/metrics")).text
    assert "windfarm_streams_moved_total{" not in metrics
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fields", [{}, {"windfarm_tools": ["calculator"]}])
async def test_a_moved_answer_is_booked_once_with_the_usage_of_the_whole(
    tmp_path: Path, stream: bool, fields: dict[str, Any]
) -> None:
    async with fleet_of(tmp_path) as (running, fleet):
        owner = running.accounts.owner_id()
        assert owner is not None
        key = running.accounts.create_key(owner, "limited", Limits(9, 10_000, 3))
        async with httpx.AsyncClient(
            base_url=running.url, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False
        ) as client:
            body = body_of(**fields) | ({} if stream else {"stream": False, "stream_options": None})
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await wait_until(lambda: has_tokens(fleet))
            await fleet.lose(busy(fleet), "kill")
            assert (await asked).status_code == 200
        (usage,) = running.limiter.book._keys.values()
        left = usage.standing(Limits(None, 10_000, None), running.limiter.book._now).remaining_tokens
    whole = expected().usage
    assert left == 10_000 - whole["prompt_tokens"] - whole["completion_tokens"]


async def test_a_client_that_leaves_while_its_stream_moves_leaves_nothing_behind(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=1, move_wait_s=30) as (running, fleet):
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=body_of()))
        await wait_until(lambda: has_tokens(fleet))
        await fleet.lose(fleet.alive[0], "kill")
        await asyncio.sleep(0.1)
        asked.cancel()
        replica = await fleet.grow()
        await asyncio.sleep(0.6)
        assert replica.engine.num_tokens == 0


async def test_the_first_replica_that_is_asked_may_be_lost_before_it_answers(tmp_path: Path) -> None:
    """The connection is accepted and reset: the request may have been the cause, so it counts."""
    resets = 0

    async def reset(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal resets
        await _reader.readuntil(b"\r\n\r\n")
        resets += 1
        writer.transport.abort()

    servers = [await asyncio.start_server(reset, "127.0.0.1", 0) for _ in range(4)]
    async with fleet_of(tmp_path, size=0, max_moves=1) as (running, _):
        for number, server in enumerate(servers):
            port = server.sockets[0].getsockname()[1]
            record = {"replica_id": f"r{number}", "app": "llm-tiny", "url": f"http://127.0.0.1:{port}", "pid": 1}
            running.beats.put(f"windfarm/llm-tiny/r{number}", json.dumps(record | {"model": "tiny"}).encode())
        await running.directory.refresh()
        answer = await running.chat()
    for server in servers:
        server.close()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_unreachable")
    assert resets == 2
