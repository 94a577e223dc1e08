"""Streams of the public endpoint: who leaves, what breaks, what is silent, and where else a request may go."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.engine import GenerationChunk, Usage
from cluster.errors import EngineBusy
from services.discovery import ReplicaEndpoint, encode_beat
from services.frames import FrameKind, encode_end, encode_frame
from services.listener import start_listener
from tests.services.harness import (
    PATIENT,
    ScriptedEngine,
    chat_body,
    error_of,
    events_of,
    running_endpoint,
    wait_until,
    words,
)


async def test_a_client_that_goes_away_cancels_its_generation(tmp_path: Path) -> None:
    for stream in (True, False):
        engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
        async with running_endpoint(tmp_path, engine) as running:
            request = asyncio.create_task(running.chat(stream=stream))
            await wait_until(lambda: engine.requests)  # noqa: B023
            engine.was_closed.clear()
            request.cancel()
            await asyncio.wait_for(engine.was_closed.wait(), 5)


async def test_a_lost_replica_is_an_error_event_and_never_done(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
    async with (
        running_endpoint(tmp_path, engine) as running,
        running.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        while "Hel" not in await anext(lines):
            pass
        await running.services[0].stop(drain_s=0)
        rest = "\n".join([line async for line in lines])
    assert events_of(rest)[-1]["error"]["code"] == "stream_lost"
    assert "[DONE]" not in rest


async def test_a_whole_answer_that_lost_its_replica_is_an_error(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
    async with running_endpoint(tmp_path, engine) as running:
        request = asyncio.create_task(running.chat())
        await wait_until(lambda: engine.requests)
        await running.services[0].stop(drain_s=0)
        answer = await request
    assert (answer.status_code, error_of(answer)["code"]) == (502, "stream_lost")


async def test_a_silent_stream_gets_comments_that_clients_ignore(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engine = ScriptedEngine(go_on, *words("late"))
    async with (
        running_endpoint(tmp_path, engine, config=PATIENT) as running,
        running.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        go_on.set()
        rest = "\n".join([line async for line in lines])
    assert events_of(rest)[-1] == "[DONE]"
    assert "late" in rest


@pytest.mark.parametrize("chunk", [GenerationChunk((1,), "late"), GenerationChunk((), "late")])
@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}])
async def test_the_first_token_is_neither_a_role_nor_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: GenerationChunk, fields: dict[str, bool]
) -> None:
    """A replica that is silent for long tells that it lives; for the scaling and the metric nothing has come yet."""
    monkeypatch.setattr("services.model_service.KEEP_ALIVE_S", 0.02)
    silence_s, go_on = 0.3, asyncio.Event()
    engine = ScriptedEngine(go_on, chunk, GenerationChunk(finish_reason="stop", usage=Usage(3, 1)))
    async with running_endpoint(tmp_path, engine) as running:
        asked = asyncio.create_task(running.chat(**fields))
        await wait_until(lambda: engine.requests)
        await asyncio.sleep(silence_s)
        before = list(running.endpoint.demand()["tiny"].first_tokens)
        go_on.set()
        assert (await asked).status_code == 200
        after = list(running.endpoint.demand()["tiny"].first_tokens)
        metrics = (await running.http.get("/metrics")).text
    assert (before, len(after)) == ([], 1)
    assert after[0][1] >= silence_s
    if fields["stream"]:
        assert float(metrics.partition('first_token_seconds_sum{model="tiny"} ')[2].split("\n")[0]) >= silence_s


async def test_what_a_replica_sends_goes_through_as_it_is(tmp_path: Path) -> None:
    """The endpoint reads the heads of the frames alone; a payload may be anything."""
    payloads = [b'data: {"cut', b"\xff\x00 no text\r\n", b"data: [DONE", b"\n\n"]

    async def replica(_scope: Mapping[str, Any], _receive: Any, send: Any) -> None:
        frames = b"".join(encode_frame(FrameKind.DATA, payload, (1,), 1) for payload in payloads)
        frames += encode_end("stop", asdict(Usage(3, 4)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": frames})

    async with running_endpoint(tmp_path) as running:
        listener = await start_listener(replica)
        raw = ReplicaEndpoint("raw", "llm-tiny", listener.url, 1, model="tiny")
        running.beats.put(raw.key, encode_beat(raw))
        await running.directory.refresh()
        answer = await running.chat(stream=True)
        await listener.stop()
    assert answer.content == b"".join(payloads) + b"data: [DONE]\n\n"


async def test_a_failure_after_comments_is_an_error_event(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engine = ScriptedEngine(go_on, EngineBusy("The queue is full."))
    async with (
        running_endpoint(tmp_path, engine, config=PATIENT) as running,
        running.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        go_on.set()
        rest = "\n".join([line async for line in lines])
    assert events_of(rest) == [
        {
            "error": {
                "message": "The queue is full.",
                "type": "service_unavailable",
                "param": None,
                "code": "engine_busy",
            }
        }
    ]


async def test_a_busy_engine_is_503_with_retry_after_before_the_stream_begins(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(EngineBusy("The queue is full."))) as running:
        answer = await running.chat(stream=True)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_busy")
    assert answer.headers["retry-after"] == "1"


async def test_a_replica_that_cannot_be_reached_is_replaced_by_another(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("ok"))) as running:
        for number in range(3):
            gone = ReplicaEndpoint(f"gone{number}", "llm-tiny", "http://127.0.0.1:9", 1, model="tiny")
            running.beats.put(gone.key, encode_beat(gone))
        await running.directory.refresh()
        answers = [await running.chat() for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}


async def test_a_full_replica_passes_its_request_to_one_with_room(tmp_path: Path) -> None:
    full, free = ScriptedEngine(EngineBusy("full")), ScriptedEngine(*words("ok"))
    async with running_endpoint(tmp_path, full, free) as running:
        answers = [await running.chat() for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}


async def test_when_no_replica_can_be_reached_the_client_hears_to_try_again(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        gone = ReplicaEndpoint("gone", "llm-tiny", "http://127.0.0.1:9", 1, model="tiny")
        running.beats.put(gone.key, encode_beat(gone))
        await running.directory.refresh()
        answer = await running.chat()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_unreachable")
