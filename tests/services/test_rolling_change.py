"""A model whose only replica is replaced is away for a moment: no request fails, and none waits for ever."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.engine import GenerationRequest
from services.chat_types import ChatEvent, ChatRequest, ModelClient
from services.config import PlatformConfig, StreamsConfig
from services.discovery import Directory
from services.model_status import ApplicationState
from tests.chaos.faults import hear
from tests.chaos.replicas import Fleet
from tests.chaos.stream_faults import STATES, Streams, fleet_of
from tests.services.harness import Beats, error_of, plain_story, running_endpoint, wait_until

STORY = {"windfarm_tools": ["calculator"]}


async def test_requests_wait_while_the_only_replica_is_replaced_and_streams_end_or_move(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, size=1) as (running, fleet):
        streams = Streams(running)
        await fleet.answers(20)
        await fleet.lose(fleet.alive[0], "drain")
        await wait_until(lambda: not running.directory.replicas("tiny"))
        later = Streams(running, number=4)
        others = [asyncio.create_task(running.chat(max_tokens=5, **fields)) for fields in ({}, STORY)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in others)
        await fleet.grow()
        await asyncio.gather(streams.end(), later.end())
        answers = await asyncio.gather(*others)
    assert streams.wrong() == later.wrong() == []
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_an_answer_waits_where_its_model_is_replaced_while_it_searches(tmp_path: Path) -> None:
    searches, has_found = asyncio.Event(), asyncio.Event()

    async def story(request: ChatRequest, model: ModelClient) -> AsyncIterator[ChatEvent]:
        searches.set()
        await has_found.wait()
        asked = GenerationRequest(request.request_id, messages=request.messages, sampling=request.sampling)
        assert await model.count_tokens(asked) < model.max_context
        async for event in plain_story(request, model):
            yield event

    async with running_endpoint(tmp_path, states=STATES, story=story) as running:
        fleet = Fleet(running, pace_s=0.01)
        await fleet.grow()
        answer = asyncio.create_task(running.chat(max_tokens=5, **STORY))
        await searches.wait()
        await fleet.lose(fleet.alive[0], "drain")
        await wait_until(lambda: not running.directory.replicas("tiny"))
        has_found.set()
        await asyncio.sleep(0.3)
        assert not answer.done()
        await fleet.grow()
        assert (await answer).status_code == 200
        await fleet.close()


@pytest.mark.parametrize("status", ["RUNNING", "DEPLOY_FAILED"])
async def test_a_model_that_does_not_come_back_is_refused_after_a_while(tmp_path: Path, status: str) -> None:
    config = PlatformConfig(streams=StreamsConfig(move_wait_s=0.5))
    states = {"llm-tiny": ApplicationState("llm-tiny", status)}
    async with running_endpoint(tmp_path, config=config, states=states) as running:
        fleet = Fleet(running, pace_s=0.01)
        await fleet.grow()
        assert (await running.chat(max_tokens=5)).status_code == 200
        await fleet.close()
        await wait_until(lambda: not running.directory.replicas("tiny"))
        answer = await running.chat(max_tokens=5)
        heard = await hear(running.http, {"model": "tiny", "messages": [], "stream": True})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")
    assert heard.status in (400, 503)


async def test_a_model_that_was_never_there_is_refused_at_once(tmp_path: Path) -> None:
    states = {"llm-tiny": ApplicationState("llm-tiny", "DEPLOYING")}
    async with running_endpoint(tmp_path, states=states) as running:
        answer = await running.chat()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")


async def test_the_directory_knows_how_long_a_model_has_been_away() -> None:
    now, beats = 0.0, Beats()
    directory = Directory(beats, clock=lambda: now)
    assert directory.seconds_away("tiny") is None
    record = b'{"replica_id":"r","app":"llm-tiny","url":"http://127.0.0.1:9","pid":1,"model":"tiny"}'
    beats.put("windfarm/llm-tiny/r", record)
    await directory.refresh()
    assert directory.seconds_away("tiny") == 0
    now = 3.0
    beats.delete("windfarm/llm-tiny/r")
    await directory.refresh()
    assert directory.seconds_away("tiny") == 3.0
